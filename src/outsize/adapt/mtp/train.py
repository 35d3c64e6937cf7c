"""The training loop of mask drafters: AdamW over a few million numbers, saved as it goes, resumed to the bit.

Several processes (started by torchrun) each take a part of every batch and average their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from outsize.adapt import checkpoints
from outsize.adapt.mtp.losses import (
    Example,
    Parameters,
    Recipe,
    draw,
    losses,
    new_parameters,
    total,
)
from outsize.adapt.mtp.simulate import walk
from outsize.adapt.processes import average, processes
from outsize.adapt.trainable import TrainableModel
from outsize.checkpoint.lora import raw
from outsize.errors import AdapterError, OptionError

BETAS, CLIP, SMOOTH = (0.9, 0.95), 1.0, 0.95


@dataclass(frozen=True, slots=True)
class Seen:
    """After a step: how far, and how well."""

    step: int
    steps: int
    loss: float  # smoothed
    tokens_per_step: float  # on held-out answers, with masks after every token; 0: not yet measured


Tell = Callable[[Seen], None]


@dataclass(slots=True)
class Training:
    """Parameters on their way."""

    twin: TrainableModel
    recipe: Recipe
    base: str  # hash of what the pack was made from
    parameters: Parameters
    optimizer: torch.optim.AdamW
    data: str = ""  # fingerprint of the examples
    step: int = 0
    loss: float = 0.0
    tokens_per_step: float = 0.0
    world: tuple[int, int] = field(default_factory=processes)

    def about(self) -> dict[str, object]:
        return {
            "kind": "masks", "base": self.base, "data": self.data, "rows": "adjacent", "step": self.step,
            "k": self.recipe.k, "scale": self.recipe.scale, "recipe": self.recipe.to_json(),
            "loss": self.loss, "held_out_tokens_per_step": self.tokens_per_step,
        }  # fmt: skip

    def run_step(self, examples: Sequence[Example]) -> None:
        rank, world = self.world
        batch = draw(examples, self.recipe, self.step, rank, world).to(self.twin.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        loss = total(losses(self.twin, self.parameters, self.recipe, batch), self.recipe)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if world > 1:
            average([p.grad for p in self.parameters.values() if p.grad is not None])
        clip_grad_norm_(self.parameters.values(), CLIP)
        self.optimizer.step()
        self.step += 1
        if self.step % 10 == 1 or self.step == self.recipe.steps:
            now = float(loss.detach())
            if not math.isfinite(now):
                raise AdapterError(
                    f"the loss is {now} after step {self.step}; train at a lower --rate"
                )
            self.loss = now if self.loss == 0 else SMOOTH * self.loss + (1 - SMOOTH) * now

    def measure(self, held_out: Sequence[Example]) -> None:
        """Tokens a step on answers that are not trained on."""
        if held_out:
            r = self.recipe
            found = walk(self.twin, self.parameters, r.scale, held_out, r.k)
            self.tokens_per_step = round(found.by_quadratic, 4)

    def save(self, path: Path) -> None:
        """Everything that going on needs."""
        if self.world[0] == 0:
            state = dict(self.parameters)
            for name, p in self.parameters.items():
                for key, value in self.optimizer.state.get(p, {}).items():
                    state[f"{name}|{key}"] = torch.as_tensor(value)
            checkpoints.save(path, state, self.about())

    def write(self, path: Path) -> None:
        """The adapter alone, in bf16."""
        if self.world[0] == 0:
            small = {k: v.detach().to(torch.bfloat16) for k, v in self.parameters.items()}
            checkpoints.save(path, small, self.about())


def start(twin: TrainableModel, recipe: Recipe, base: str, data: str = "") -> Training:
    """Raises OptionError if some process would have nothing of a step's batch."""
    if recipe.batch < processes()[1]:
        raise OptionError(
            f"batch is {recipe.batch}, for {processes()[1]} processes; give at least one sequence each"
        )
    made = new_parameters(twin.description, recipe, twin.embed_VD)
    parameters = {k: v.to(twin.device).requires_grad_() for k, v in made.items()}
    return Training(twin, recipe, base, parameters, _optimizer(parameters, recipe), data)


def _differences(about: Mapping[str, object], recipe: Recipe, base: str, data: str) -> list[str]:
    """What a checkpoint says of itself that is otherwise now."""
    told = about.get("recipe")
    known, now = told if isinstance(told, dict) else {}, recipe.to_json()
    out = [f"{k} was {known.get(k)!r}, is {v!r}" for k, v in now.items() if known.get(k) != v]
    out += [] if about.get("base") == base else ["the model's weights differ"]
    return out + ([] if about.get("data") == data else ["the prompts or answers differ"])


def resume(twin: TrainableModel, recipe: Recipe, base: str, path: Path, data: str = "") -> Training:
    """Go on from a checkpoint of the same recipe and data. Raises AdapterError."""
    tensors, about = raw(path)
    if found := _differences(about, recipe, base, data):
        raise AdapterError(
            f"{path} is a checkpoint of another model or recipe, or of other data ({'; '.join(found)}); give "
            "the flags and files it was started with, or remove it to begin anew"
        )
    training = start(twin, recipe, base, data)
    try:
        with torch.no_grad():
            for name, p in training.parameters.items():
                p.copy_(tensors[name])
                state = {k: tensors[f"{name}|{k}"] for k in ("exp_avg", "exp_avg_sq", "step")}
                moved = {k: v if k == "step" else v.to(twin.device) for k, v in state.items()}
                training.optimizer.state[p] = moved
    except (KeyError, RuntimeError) as e:
        raise AdapterError(f"{path} is not a checkpoint of this recipe ({e})") from None
    training.step, training.loss = int(str(about["step"])), float(str(about["loss"]))
    return training


def train(
    training: Training,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    path: Path,
    every: int,
    tell: Tell,
) -> None:
    """Train to the recipe's end. `path` is kept up to date every so many steps and when interrupted."""
    r = training.recipe
    try:
        while training.step < r.steps:
            training.run_step(examples)
            if training.step % every == 0 or training.step == r.steps:
                training.measure(held_out)
                training.save(path)
            tell(Seen(training.step, r.steps, training.loss, training.tokens_per_step))
    except KeyboardInterrupt:
        training.save(path)
        raise


def _optimizer(parameters: Parameters, recipe: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters.values(), lr=recipe.rate, betas=BETAS, weight_decay=0.0)
