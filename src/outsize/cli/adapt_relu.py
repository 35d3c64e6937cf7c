"""`outsize adapt relu`. Imports of anything heavy happen inside the command."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from outsize.cli.command import only, with_flags
from outsize.cli.flags import DisplayOptions, Flag
from outsize.options import DEFAULT_MODEL, LoadOptions


@dataclass(frozen=True, slots=True)
class ReluFlags:
    """What to train on."""

    data: Annotated[list[Path], Flag("--data", "Text, or prompts: .txt or .jsonl (repeatable).")]
    tokens: Annotated[int, Flag("--tokens", "Of the data, that are read.")] = 1 << 20
    every: Annotated[int, Flag("--every", "Steps between checkpoints.")] = 50
    resume: Annotated[bool, Flag("--resume", "Go on from the checkpoint.")] = False
    device: Annotated[str, Flag("--device", "auto, cpu or cuda.")] = "auto"


@dataclass(frozen=True, slots=True)
class ReluRecipeFlags:
    """How to train; fields are those of the recipe."""

    steps: Annotated[int, Flag("--steps", "Steps.")] = 500
    batch: Annotated[int, Flag("--batch", "Sequences a step.")] = 4
    rate: Annotated[float, Flag("--rate", "Highest learning rate.")] = 3e-4
    length: Annotated[int, Flag("--length", "Tokens of a sequence.")] = 256
    threshold: Annotated[
        float, Flag("--threshold", "A gate counts above it (FATReLU); 0: ReLU.")
    ] = 0.0
    match: Annotated[
        float, Flag("--match", "What the outputs of feed-forwards count beside predictions.")
    ] = 1.0
    penalty: Annotated[float, Flag("--penalty", "What open gates count.")] = 0.1
    bundle: Annotated[int, Flag("--bundle", "Neighbours that are to fire together.")] = 1
    seed: Annotated[int, Flag("--seed", "The same seed trains the same model.")] = 0


@with_flags
def relu(
    own: ReluFlags,
    recipe: ReluRecipeFlags,
    load: Annotated[LoadOptions, only("threads", "quiet", "memory", "encoding")],
    display: Annotated[DisplayOptions, only("json")],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """A model with ReLU in place of SwiGLU, trained from the model itself, so that few neurons fire."""
    from outsize.adapt.processes import is_first
    from outsize.adapt.relu import run as relufying
    from outsize.adapt.relu.task import ReluRecipe
    from outsize.log import say
    from outsize.plan.probe import set_threads

    set_threads(load.threads)
    given = asdict(own) | {"data": tuple(own.data)}
    options = relufying.ReluOptions(
        model, encoding=load.encoding, memory=load.memory, quiet=load.quiet, **given
    )
    made = relufying.run(options, ReluRecipe(**asdict(recipe)))
    if not is_first():
        return
    if display.json:
        print(json.dumps(relufying.about(made)))
    else:
        print(relufying.summary(made))
    if not load.quiet:
        say(
            f"wrote {made.pack.path}; run it with -m {made.pack.path}, and page its neurons with "
            f"`outsize adapt sparsity {made.pack.path} --predictor gate:exact --order natural --data ...`"
        )
