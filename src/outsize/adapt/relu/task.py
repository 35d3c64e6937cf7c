"""The training task of relufication: a model with ReLU, or FATReLU, in place of SwiGLU, learned from the
model itself (arXiv 2310.04564, 2402.13516). Gate, up and down of each layer learn; all else stays.

The loss is how far its predictions are from the model's own; how far each feed-forward's output is from what
the model's own feed-forward said there, which few tokens tell already; and how much the gates let through, so
that few neurons fire. What a disk reads at once is a bundle of neighbours, which is read if one of them does:
with `bundle` the penalty is on the size of each bundle (group lasso), so that neighbours fire together.
Shapes: B sequences, T tokens, D width, F neurons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import cross_entropy

from outsize.adapt.change import Change
from outsize.adapt.head_loss import head_divergence
from outsize.adapt.loop import Recipe
from outsize.adapt.statistics import FIRST, causal
from outsize.adapt.trainable import TrainableModel
from outsize.arguments import real, whole
from outsize.kernels.plain import FATRELU, activation_of
from outsize.model_config import Description

NAMES = "gate_up", "down"
JUDGED = 16  # held-out sequences, at most


@dataclass(frozen=True, slots=True)
class ReluRecipe(Recipe):
    """`threshold`: what a gate must be above to count (FATReLU); `match`, `penalty`: what the outputs of
    feed-forwards, and open gates, count beside the divergence; `bundle`: neighbours that are to fire
    together."""

    steps: int = 500
    batch: int = 4
    rate: float = 3e-4
    length: int = 256
    threshold: float = 0.0
    match: float = 1.0
    penalty: float = 0.1
    bundle: int = 1

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        whole("bundle", self.bundle, 1, 1 << 20)
        real("threshold", self.threshold, 0.0, 1000.0)
        for name in ("match", "penalty"):
            real(name, getattr(self, name), 0.0, 1000.0)

    @property
    def activation(self) -> str:
        """As a description names it."""
        return f"{FATRELU}:{self.threshold:.6f}" if self.threshold else "relu"


class Outputs(Change):
    """Keeps what each feed-forward says."""

    def __init__(self) -> None:
        self.made: dict[int, Tensor] = {}

    def add(self, y: Tensor, x: Tensor, layer: int, names: Sequence[str]) -> Tensor:
        if names == ("down",):
            self.made[layer] = y
        return y


class Student(Outputs):
    """Runs feed-forwards with other matrices, and another activation. `opened`: how far each layer's gates
    are open, bundle by bundle, for their size; `fires`, `bundles`: the share of neurons, and of bundles, that
    is."""

    def __init__(self, matrices: Mapping[str, Tensor], activation: str, bundle: int) -> None:
        super().__init__()
        self._matrices, self._activation, self._bundle = matrices, activation, bundle
        self.opened: list[Tensor] = []
        self.fires: list[Tensor] = []
        self.bundles: list[Tensor] = []

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        return self._matrices[f"{layer}.{name}"].to(x.dtype) if name in NAMES else w

    def inner(self, gate_up: Tensor, d: Description) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        active = activation_of(self._activation)(gate)
        size = gate.detach().float().square().mean().sqrt().clamp_min(1e-12)
        together = active.float().unflatten(-1, (-1, self._bundle))
        norms = vector_norm(together, dim=-1) if self._bundle > 1 else together
        self.opened.append(norms.mean() / self._bundle**0.5 / size)
        fires = together.detach() > 0
        self.fires.append(fires.float().mean())
        self.bundles.append(fires.any(dim=-1).float().mean())
        return active * up


class ReluTask:
    """A `Task` of the training loop."""

    use = "--model "

    def __init__(
        self, recipe: ReluRecipe, model: TrainableModel, ids_BT: Tensor, held_out_BT: Tensor
    ) -> None:
        self.recipe, self.model = recipe, model
        self._ids, self._held_out = ids_BT, held_out_BT[:JUDGED]
        self.parameters = {
            f"{layer}.{name}": model.tensors(layer)[name].float().clone().requires_grad_()
            for layer in range(model.description.num_layers)
            for name in NAMES
        }

    def loss(self, step: int, part: slice) -> Tensor:
        recipe, generator = self.recipe, torch.Generator()
        generator.manual_seed(recipe.seed * 1_000_003 + step)
        chosen = torch.randint(len(self._ids), (recipe.batch,), generator=generator)
        former = Outputs()
        student = Student(self.parameters, recipe.activation, recipe.bundle)
        ids_BT = self._ids[chosen[part]].to(self.model.device)
        with torch.no_grad():
            due, _ = self.model.run(causal(self.model.embed(ids_BT)), None, former)
        made, _ = self.model.run(causal(self.model.embed(ids_BT)), None, student)
        apart = head_divergence(made.flatten(0, 1), due.flatten(0, 1), self.model.head_VD)
        missed = [_missed(student.made[i], former.made[i]) for i in sorted(former.made)]
        matched, opened = torch.stack(missed).mean(), torch.stack(student.opened).mean()
        return apart + recipe.match * matched + recipe.penalty * opened

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On texts that are not trained on: perplexity, the model's own, and the shares of neurons and of
        bundles that fire."""
        student = Student(self.parameters, self.recipe.activation, self.recipe.bundle)
        after, before = (self._perplexity(change) for change in (student, Outputs()))
        fires, bundles = (float(torch.stack(x).mean()) for x in (student.fires, student.bundles))
        return {
            "perplexity": round(after, 4), "perplexity_before": round(before, 4),
            "fires": round(fires, 6), "bundles_fire": round(bundles, 6),
        }  # fmt: skip

    def _perplexity(self, change: Change) -> float:
        loss, count = 0.0, 0
        for ids in self._held_out.to(self.model.device).split(1):
            states, _ = self.model.run(causal(self.model.embed(ids)), None, change)
            logits = self.model.logits(states[0, :-1]).float()
            loss += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += len(logits)
        return math.exp(min(loss / max(1, count), 700.0))

    def about(self) -> dict[str, object]:
        return {"kind": "relu", "activation": self.recipe.activation}


def _missed(made_BTD: Tensor, due_BTD: Tensor) -> Tensor:
    """How much of an output's energy is not there; of positions whose states are not unlike all others."""
    made, due = (x[:, FIRST:].float() for x in (made_BTD, due_BTD))
    return (made - due).square().mean() / due.square().mean().clamp_min(1e-12)
