"""`outsize adapt align`: an adapter that learns from what a program checks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from outsize.cli.command import only, with_flags
from outsize.cli.flags import Flag, Texts, named_adapters
from outsize.options import DEFAULT_MODEL, LoadOptions


@dataclass(frozen=True, slots=True)
class AlignFlags:
    """What is learned, and where it goes."""

    task: Annotated[Path, Flag("--task", "Prompts and what answers are checked for, .json (docs).")]
    output: Annotated[Path, Flag("-o --output", "The adapter, .safetensors.")]
    method: Annotated[
        str, Flag("--method", "mdloo (learn from all samples) or reject (from a committee's best).")
    ] = "mdloo"
    members: Annotated[
        dict[str, Path] | None,
        Flag(
            "--member",
            "An adapter of the committee, NAME=PATH (repeatable).",
            Texts,
            named_adapters,
        ),
    ] = None
    every: Annotated[int, Flag("--every", "Steps between checkpoints.")] = 100
    resume: Annotated[bool, Flag("--resume", "Go on from the checkpoint.")] = False
    device: Annotated[str, Flag("--device", "auto, cpu or cuda.")] = "auto"


@dataclass(frozen=True, slots=True)
class AlignRecipeFlags:
    """How to align; fields are those of the recipe."""

    steps: Annotated[int, Flag("--steps", "Steps.")] = 100
    batch: Annotated[int, Flag("--batch", "Prompts a step.")] = 8
    rate: Annotated[float, Flag("--rate", "Highest learning rate.")] = 5e-4
    length: Annotated[int, Flag("--length", "Most tokens of a prompt and its answer.")] = 512
    seed: Annotated[int, Flag("--seed", "The same seed trains the same.")] = 0
    samples: Annotated[int, Flag("--samples", "Answers to each prompt.")] = 4
    inner: Annotated[int, Flag("--inner", "Steps on the same answers.")] = 2
    beta: Annotated[float, Flag("--beta", "Of the penalty for leaving the model.")] = 0.02
    eta: Annotated[float, Flag("--eta", "Of the trust region: larger is freer.")] = 1.0
    max_tokens: Annotated[int, Flag("-n --max-tokens", "Of an answer.")] = 32
    rank: Annotated[int, Flag("--rank", "Of the adapter.")] = 8
    baseline: Annotated[
        str, Flag("--baseline", "loo (the mean of the other answers), mean (of all) or none.")
    ] = "loo"


@with_flags
def align(
    own: AlignFlags,
    recipe: AlignRecipeFlags,
    load: Annotated[LoadOptions, only("threads", "quiet", "memory")],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """Train a LoRA adapter on rewards that a program checks (small: format tasks)."""
    from outsize.adapt.align.mdloo import AlignRecipe
    from outsize.adapt.align.run import AlignOptions
    from outsize.adapt.align.run import align as run
    from outsize.adapt.examples import TrainOptions
    from outsize.plan.probe import set_threads

    set_threads(load.threads)
    where = TrainOptions(
        model,
        (),
        own.output,
        every=own.every,
        resume=own.resume,
        device=own.device,
        quiet=load.quiet,
        memory=load.memory,
    )
    learned = AlignRecipe(**asdict(recipe))
    run(AlignOptions(where, learned, own.task, own.method, own.members))
