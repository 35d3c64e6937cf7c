"""`outsize adapt ...`: recipes. Imports of anything heavy happen inside the commands."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from outsize.cli.flags import Quiet, Threads, option, told
from outsize.errors import OptionError
from outsize.options import DEFAULT_MODEL

app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Train what makes a model faster or better."
)


@app.callback()
def recipes() -> None:
    """Train what makes a model faster or better."""


@app.command("masks", hidden=True)  # its earlier name
@app.command()
def mtp(
    ctx: typer.Context,
    data: Annotated[list[Path], option("--data", text="Prompts: .txt or .jsonl (repeatable).")],
    output: Annotated[Path, option("-o", "--output", text="The adapter, .safetensors.")],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
    k: Annotated[int, option("--k", text="Mask tokens.")] = 4,
    rank: Annotated[int, option("--rank", text="Of the low-rank additions.")] = 16,
    num_steps: Annotated[int, option("--steps", text="Steps.")] = 2000,
    batch: Annotated[int, option("--batch", text="Sequences a step.")] = 4,
    anchors: Annotated[int, option("--anchors", text="Tokens of each that get masks.")] = 32,
    rate: Annotated[float, option("--rate", text="Highest learning rate.")] = 1e-3,
    length: Annotated[int, option("--length", text="Most tokens of a sequence.")] = 512,
    own_answers: Annotated[
        bool,
        option("--own-answers/--given-answers", text="Let the model answer the prompts first."),
    ] = True,
    max_tokens: Annotated[int, option("-n", "--max-tokens", text="Of an own answer.")] = 128,
    at_once: Annotated[int, option("--at-once", text="Own answers made at once.")] = 16,
    every: Annotated[int, option("--every", text="Steps between checkpoints.")] = 100,
    resume: Annotated[bool, option("--resume", text="Go on from the checkpoint.")] = False,
    device: Annotated[str, option("--device", text="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, option("--seed", text="The same seed trains the same adapter.")] = 0,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Multi-token prediction: train mask tokens with which a dense model drafts for itself."""
    from outsize.adapt.examples import TrainOptions
    from outsize.adapt.mtp.losses import MtpRecipe
    from outsize.adapt.mtp.task import MtpTask
    from outsize.adapt.run import run
    from outsize.engine import load as loading

    for name in ("max_tokens", "at_once"):
        if name in told(ctx) and not own_answers:
            flag = name.replace("_", "-")
            raise OptionError(
                f"--{flag} is of own answers; leave it out, or leave --given-answers out"
            )
    loading.set_threads(threads)
    recipe = MtpRecipe(
        k=k, rank=rank, steps=num_steps, batch=batch, anchors=anchors, rate=rate, length=length,
        seed=seed,
    )  # fmt: skip
    options = TrainOptions(
        model, tuple(data), output, own_answers, max_tokens, at_once, every, resume, device, quiet
    )
    run(options, recipe, partial(MtpTask, recipe))
