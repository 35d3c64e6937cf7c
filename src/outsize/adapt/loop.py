"""The training loop: AdamW over a task's parameters, saved as it goes, resumed to bit-identical weights.

A task says what is learned, from what, and how it is judged; it is a file or folder beside this one (`mtp/`).
Of several processes (started by torchrun) each takes a part of every batch, and gradients are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from outsize.adapt import checkpoints
from outsize.adapt.processes import average, processes
from outsize.arguments import real, whole
from outsize.checkpoint.lora import raw
from outsize.errors import AdapterError, OptionError
from outsize.system.interrupts import put_off

BETAS, CLIP, SMOOTH = (0.9, 0.95), 1.0, 0.95
KEPT = "kept|"  # before the names of what a task keeps beside
STATE = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of a parameter


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. What it says decides the result: the same recipe, data and device give the same
    weights. A task adds fields of its own."""

    steps: int = 2000
    batch: int = 8  # sequences a step
    rate: float = 1e-3
    warmup: float = 0.1  # of the steps; then down to nothing along a cosine
    length: int = 512  # tokens of a sequence; longer ones are left out
    seed: int = 0

    def __post_init__(self) -> None:
        whole("steps", self.steps, self.least_steps, 1 << 30)
        for name, most in (("batch", 1 << 16), ("length", 1 << 24)):
            whole(name, getattr(self, name), 1, most)
        real("rate", self.rate, 0.0, 1.0)

    @property
    def least_steps(self) -> int:
        return 1

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @property
    def weight_decay(self) -> float:
        """Of AdamW; some tasks have one."""
        return 0.0

    @property
    def fused(self) -> bool:
        """AdamW in one pass over the numbers? Sooner, where many learn; other roundings."""
        return False

    def rate_at(self, step: int) -> float:
        warm = max(1, int(self.warmup * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


class Task(Protocol):
    """What is trained."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """What learns, by name: leaves on the training device that require gradients."""

    @property
    def use(self) -> str:
        """The flag that takes the trained file, up to the file's name."""

    def loss(self, step: int, part: slice) -> Tensor:
        """Mean loss of a step's batch, of which this process takes `part`. By step and seed alone."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, by name."""

    def about(self) -> dict[str, object]:
        """What the file's header says beside recipe, data, step and figures."""


@runtime_checkable
class Keeping(Protocol):
    """A task with a state of its own, which its checkpoints have, too."""

    def kept(self) -> dict[str, Tensor]:
        """What going on needs beside parameters and the optimizer's state, by name."""

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Go on with what `kept` gave."""


@dataclass(slots=True)
class Training:
    """A task on its way."""

    task: Task
    base: str  # hash of what the pack was made from
    data: str  # fingerprint of the examples
    optimizer: torch.optim.AdamW
    step: int = 0
    loss: float = 0.0  # smoothed
    figures: dict[str, float] = field(default_factory=dict)  # as last evaluated

    def about(self) -> dict[str, object]:
        """The header of a checkpoint or of the trained file."""
        told = {"base": self.base, "data": self.data, "step": self.step, "loss": self.loss}
        return {**self.task.about(), **told, "recipe": self.task.recipe.to_json(), **self.figures}

    def summary(self) -> str:
        """Figures, in words."""
        return ", ".join(f"{name.replace('_', ' ')} {v:.2f}" for name, v in self.figures.items())

    def run_step(self) -> None:
        """One step of the optimizer. Raises AdapterError where the loss is no number."""
        recipe, parameters, (rank, world) = self.task.recipe, self.task.parameters, processes()
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate_at(self.step)
        loss = self.task.loss(self.step, slice(rank, None, world))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if world > 1:
            average([p.grad for p in parameters.values() if p.grad is not None])
        clip_grad_norm_(parameters.values(), CLIP)
        self.optimizer.step()
        self.step += 1
        if self.step % 10 == 1 or self.step == recipe.steps:
            now = float(loss.detach())
            if not math.isfinite(now):
                raise AdapterError(
                    f"the loss is {now} after step {self.step}; train at a lower --rate"
                )
            self.loss = now if self.loss == 0 else SMOOTH * self.loss + (1 - SMOOTH) * now

    def save(self, path: Path) -> None:
        """Everything that going on needs. Raises AdapterError where that is no number: what was saved before
        stays."""
        state = dict(self.task.parameters)
        if wrong := [name for name, p in state.items() if not bool(torch.isfinite(p).all())]:
            raise AdapterError(
                f"{wrong[0]} has no finite numbers after step {self.step}; train at a lower --rate"
            )
        for name, p in self.task.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                state[f"{name}|{key}"] = torch.as_tensor(value)
        if isinstance(self.task, Keeping):
            state |= {f"{KEPT}{name}": value for name, value in self.task.kept().items()}
        self._save(path, state)

    def write(self, path: Path) -> None:
        """What was trained alone, in bf16."""
        self._save(path, {k: v.detach().bfloat16() for k, v in self.task.parameters.items()})

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        if processes()[0] == 0:
            checkpoints.save(path, tensors, self.about())


def start(task: Task, base: str, data: str = "") -> Training:
    """Raises OptionError if some process would have nothing of a step's batch."""
    recipe, (_, world) = task.recipe, processes()
    if recipe.batch < world:
        raise OptionError(
            f"batch is {recipe.batch}, for {world} processes; give at least one sequence each"
        )
    optimizer = torch.optim.AdamW(
        task.parameters.values(), lr=recipe.rate, betas=BETAS, weight_decay=recipe.weight_decay,
        fused=True if recipe.fused else None,
    )  # fmt: skip
    return Training(task, base, data, optimizer)


def resume(task: Task, path: Path, base: str, data: str = "") -> Training:
    """Go on from a checkpoint of the same recipe and data. Raises AdapterError."""
    tensors, about = raw(path)
    training = start(task, base, data)
    if found := _differences(about, training):
        raise AdapterError(
            f"{path} is a checkpoint of another model or recipe, or of other data ({'; '.join(found)}); give "
            "the flags and files it was started with, or remove it to begin anew"
        )
    try:
        with torch.no_grad():
            for name, p in task.parameters.items():
                p.copy_(tensors[name])
                state = {key: tensors[f"{name}|{key}"] for key in STATE}
                moved = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
                training.optimizer.state[p] = moved
        if isinstance(task, Keeping):
            kept = [name for name in tensors if name.startswith(KEPT)]
            task.restore({name.removeprefix(KEPT): tensors[name] for name in kept})
        training.step, training.loss = int(str(about["step"])), float(str(about["loss"]))
    except (KeyError, RuntimeError, ValueError) as e:
        raise AdapterError(
            f"{path} is not a checkpoint of this recipe ({e}); remove it to begin anew"
        ) from None
    return training


def _differences(about: Mapping[str, object], training: Training) -> list[str]:
    """What a checkpoint says of itself that is otherwise now."""
    told, now = about.get("recipe"), training.task.recipe.to_json()
    known = told if isinstance(told, dict) else {}
    own = {k: v for k, v in training.task.about().items() if k != "kind"}
    known, now = {**known, **{k: about.get(k) for k in own}}, {**now, **own}
    out = [f"{k} was {known.get(k)!r}, is {v!r}" for k, v in now.items() if known.get(k) != v]
    kind, was = training.task.about().get("kind"), about.get("kind")
    out += [] if was == kind else [f"kind was {was!r}, is {kind!r}"]
    out += [] if about.get("base") == training.base else ["the model's weights differ"]
    return out + ([] if about.get("data") == training.data else ["the prompts or answers differ"])


def train(
    training: Training,
    path: Path,
    every: int,
    report: Callable[[Training], None],
    until: int | None = None,
) -> None:
    """Train to the recipe's end, or so many of its steps, `report` after each. The checkpoint `path` is kept
    up to date every so many steps and when interrupted, after a whole step."""
    due = training.task.recipe.steps
    steps = due if until is None else min(due, until)
    try:
        while training.step < steps:
            with put_off():
                training.run_step()
            if training.step % every == 0 or training.step == steps:
                training.figures = training.task.evaluate()
                training.save(path)
            report(training)
    except KeyboardInterrupt:
        training.save(path)
        raise
