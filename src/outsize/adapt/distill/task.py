"""The training task of everything that is distilled: a student learns to predict as its teacher does. What
learns, a `Student` says: tables of codes, low-rank factors, whole matrices.

Shapes: B sequences, S tokens, N predictions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from outsize.adapt.change import AS_IS, Change
from outsize.adapt.distill.data import Batch, Data, collate, predicted, sample
from outsize.adapt.divergence import Divergence, divergence
from outsize.adapt.examples import Example
from outsize.adapt.head_kl import head_kl, mixed_loss
from outsize.adapt.head_loss import head_loss
from outsize.adapt.loop import Recipe
from outsize.adapt.processes import processes
from outsize.adapt.trainable import Rows, TrainableModel
from outsize.errors import OptionError

LOSSES = ("kl", "mix", "ce")
AT_ONCE = 4  # sequences that are measured at once


@dataclass(frozen=True, slots=True)
class DistillRecipe(Recipe):
    """How to distil. `loss`: the whole of the teacher's predictions ("kl"), its first choice mixed with the
    text's token ("mix"), or that token alone ("ce")."""

    loss: str = "kl"

    @property
    def least_steps(self) -> int:
        """None: what training would begin from is the result."""
        return 0

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        if self.loss not in LOSSES:
            raise OptionError(f"loss is {self.loss!r}; known are {', '.join(LOSSES)}")


class Student(Protocol):
    """What learns, over a model's own numbers."""

    @property
    def model(self) -> TrainableModel: ...

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Leaves on the model's device that require gradients."""

    @property
    def kind(self) -> str:
        """What the file's header says it is."""

    @property
    def use(self) -> str:
        """The flag that takes the trained file, up to the file's name."""

    def change(self, step: int | None) -> Change:
        """What the parameters change in the model; as it will be written where there is no step."""

    def about(self) -> dict[str, object]:
        """What the file's header says beside."""


class DistillTask:
    """A `Task` of the training loop. Teacher and student share embedding and head."""

    def __init__(
        self, recipe: DistillRecipe, teacher: TrainableModel, student: Student, data: Data
    ) -> None:
        self.recipe, self.student, self._data = recipe, student, data
        self.use, self.parameters = student.use, student.parameters
        self._teacher = teacher
        self._former: dict[str, Tensor] = {}

    def loss(self, step: int, part: slice) -> Tensor:
        """Mean over the predictions of the whole batch, times the number of processes: their average is the
        mean, however the sequences' lengths fall."""
        together = sample(self._data.train, self.recipe, step)
        count, mine = sum(predicted(e) for e in together), together[part]
        share = processes()[1] * sum(predicted(e) for e in mine) / count
        batch, model = collate(mine, self.student.model.device), self.student.model
        z_ND = states(model, batch, self.student.change(step))
        if self.recipe.loss == "ce":
            return share * head_loss(z_ND, batch.label_N, model.head_VD)
        with torch.no_grad():
            former_ND = states(self._teacher, batch)
        if self.recipe.loss == "mix":
            return share * mixed_loss(z_ND, former_ND, batch.label_N, model.head_VD)
        return share * head_kl(z_ND, former_ND, model.head_VD)

    def evaluate(self) -> dict[str, float]:
        """KL to the teacher on what is held out."""
        change = self.student.change(None)
        return {f"kl_{kind}": round(found.kl, 5) for kind, found in self.measure(change).items()}

    @torch.no_grad()
    def measure(self, change: Change) -> dict[str, Divergence]:
        """Of the student with a change, from the teacher, on each kind of what is held out."""
        out, model = dict[str, Divergence](), self.student.model
        for kind, examples in self._data.held_out.items():
            if kind not in self._former:
                self._former[kind] = _all(self._teacher, examples, AS_IS)
            labels = [t for e in examples for t in e.tokens[e.num_prompt :]]
            next_N = torch.tensor(labels, device=model.device)
            out[kind] = divergence(model, self._former[kind], _all(model, examples, change), next_N)
        return out

    def about(self) -> dict[str, object]:
        return {"kind": self.student.kind, **self.student.about()}


def states(model: TrainableModel, batch: Batch, change: Change = AS_IS) -> Tensor:
    """(N, D): what the head multiplies, where something is predicted."""
    x_BSD, _ = model.run(rows(model, batch.tokens_BS), change=change)
    return x_BSD[batch.row_N, batch.at_N]


def rows(model: TrainableModel, tokens_BS: Tensor) -> Rows:
    """Whole sequences, each of whose tokens sees those before it."""
    count, size = tokens_BS.shape
    positions = torch.arange(size, device=model.device).expand(count, -1)
    allow = torch.ones(size, size, dtype=torch.bool, device=model.device).tril()
    return Rows(model.embed(tokens_BS), positions, allow.expand(count, -1, -1))


def _all(model: TrainableModel, examples: Sequence[Example], change: Change) -> Tensor:
    """The states of all predictions, sequence by sequence."""
    parts = [examples[i : i + AT_ONCE] for i in range(0, len(examples), AT_ONCE)]
    return torch.cat([states(model, collate(part, model.device), change) for part in parts])
