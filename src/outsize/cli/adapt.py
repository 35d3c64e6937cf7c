"""`outsize adapt ...`: recipes. Imports of anything heavy happen inside the commands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from outsize.cli import distill
from outsize.cli.adapt_memory import memory
from outsize.cli.adapt_relu import relu
from outsize.cli.adapt_sync import sync
from outsize.cli.align import align
from outsize.cli.command import only, with_flags
from outsize.cli.distill import check_answers
from outsize.cli.flags import Flag
from outsize.options import DEFAULT_MODEL, LoadOptions

app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Train what makes a model faster or better."
)


@app.callback()
def recipes() -> None:
    """Train what makes a model faster or better."""


@dataclass(frozen=True, slots=True)
class RecipeFlags:
    """How to train; fields are those of the recipe."""

    k: Annotated[int, Flag("--k", "Mask tokens.")] = 4
    rank: Annotated[int, Flag("--rank", "Of the low-rank additions.")] = 16
    steps: Annotated[int, Flag("--steps", "Steps.")] = 2000
    batch: Annotated[int, Flag("--batch", "Sequences a step.")] = 4
    anchors: Annotated[int, Flag("--anchors", "Tokens of each that get masks.")] = 32
    rate: Annotated[float, Flag("--rate", "Highest learning rate.")] = 1e-3
    length: Annotated[int, Flag("--length", "Most tokens of a sequence.")] = 512
    seed: Annotated[int, Flag("--seed", "The same seed trains the same adapter.")] = 0


@dataclass(frozen=True, slots=True)
class TrainFlags:
    """What to train on, and where."""

    data: Annotated[list[Path], Flag("--data", "Prompts: .txt or .jsonl (repeatable).")]
    output: Annotated[Path, Flag("-o --output", "The adapter, .safetensors.")]
    own_answers: Annotated[
        bool, Flag("--own-answers/--given-answers", "Let the model answer the prompts first.")
    ] = True
    max_tokens: Annotated[int, Flag("-n --max-tokens", "Of an own answer.")] = 128
    at_once: Annotated[int, Flag("--at-once", "Own answers made at once.")] = 16
    every: Annotated[int, Flag("--every", "Steps between checkpoints.")] = 100
    resume: Annotated[bool, Flag("--resume", "Go on from the checkpoint.")] = False
    device: Annotated[str, Flag("--device", "auto, cpu or cuda.")] = "auto"


@dataclass(frozen=True, slots=True)
class SparsityFlags:
    """What to measure, and how much to compute."""

    data: Annotated[list[Path], Flag("--data", "Text, or prompts: .txt or .jsonl (repeatable).")]
    output: Annotated[
        Path | None,
        Flag("-o --output", "The add-on file; by default beside the pack, for --neurons auto."),
    ] = None
    share: Annotated[
        float, Flag("--share", "Of the neurons, that are computed: above 0, to 1.")
    ] = 0.5
    predictor: Annotated[
        str, Flag("--predictor", "svd[:RANK], trained[:RANK], gate[:BITS] or gate:exact.")
    ] = "svd"
    choose: Annotated[
        str,
        Flag(
            "--choose",
            "Bundles by importance, or chunks of them by importance over measured read cost "
            "(chunks:GAP: a read's beginning costs so many bundles).",
        ),
    ] = "importance"
    order: Annotated[
        str,
        Flag(
            "--order",
            "Of neurons: use (bundles of few), or natural (of 32 neighbours, exact codes).",
        ),
    ] = "use"
    bundle: Annotated[int | None, Flag("--bundle", "Neurons that are read together.")] = None
    tokens: Annotated[int, Flag("--tokens", "Of the data, that are read.")] = 8192
    resume: Annotated[bool, Flag("--resume", "Go on from the checkpoint.")] = False


app.command()(memory)
app.command()(relu)
app.command()(sync)


@app.command()
@with_flags
def sparsity(
    own: SparsityFlags,
    load: Annotated[LoadOptions, only("threads", "quiet", "memory")],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """Paged neurons: measure which neurons of a dense model fire, so that others need not be read."""
    from outsize.adapt.sparsity.run import SparsityOptions, run
    from outsize.log import say
    from outsize.plan.probe import set_threads

    set_threads(load.threads)
    given = asdict(own) | {"data": tuple(own.data)}
    made = run(SparsityOptions(model=model, memory=load.memory, quiet=load.quiet, **given))
    print("\n".join(made.table))
    if not load.quiet:
        size = made.path.stat().st_size / 1e6
        say(f"wrote {made.path} ({size:.1f} MB); use it with --neurons {made.path}")


@dataclass(frozen=True, slots=True)
class NestedFlags:
    """What to cut, and how routers are trained; fields are those of the options and the recipe."""

    data: Annotated[list[Path], Flag("--data", "Text, or prompts: .txt or .jsonl (repeatable).")]
    widths: Annotated[str, Flag("--widths", "Of feed-forwards, rising, the last 1.")] = (
        "1/4,1/2,3/4,1"
    )
    importance: Annotated[str, Flag("--importance", "Of neurons: norm, plain or taylor.")] = "norm"
    blocks: Annotated[
        bool,
        Flag("--blocks/--neurons", "Order by 32 neurons, whose codes are kept, or one by one."),
    ] = False
    labels: Annotated[
        str, Flag("--labels", "Difficulty by agreement with the whole, or by the loss.")
    ] = "agreement"
    target: Annotated[
        float, Flag("--target", "Share of the feed-forwards that labels execute.")
    ] = 0.6
    rank: Annotated[int, Flag("--rank", "Of corrections of narrow widths; 0: none.")] = 0
    tune: Annotated[
        int,
        Flag(
            "--tune", "Steps in which feed-forwards learn, too: narrow widths gain, full changes."
        ),
    ] = 0
    tune_rate: Annotated[float, Flag("--tune-rate", "Highest learning rate of --tune.")] = 3e-4
    tune_until: Annotated[
        int | None,
        Flag(
            "--tune-until",
            "End after so many of them, as yet (0: refitted alone); --resume goes on.",
        ),
    ] = None
    tokens: Annotated[int, Flag("--tokens", "Of the data, that are read.")] = 32768
    steps: Annotated[int, Flag("--steps", "Steps.")] = 200
    batch: Annotated[int, Flag("--batch", "Sequences a step.")] = 2
    rate: Annotated[float, Flag("--rate", "Highest learning rate.")] = 1e-2
    seed: Annotated[int, Flag("--seed", "The same seed trains the same routers.")] = 0
    every: Annotated[int, Flag("--every", "Steps between checkpoints.")] = 50
    resume: Annotated[bool, Flag("--resume", "Go on from the checkpoint.")] = False


@app.command()
@with_flags
def nested(
    own: NestedFlags,
    load: Annotated[LoadOptions, only("threads", "quiet", "memory")],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """Nested experts: cut a dense model's feed-forwards so that easy tokens read and compute less."""
    from outsize.adapt.nested.run import NestedOptions, run
    from outsize.adapt.nested.task import NestedRecipe
    from outsize.adapt.nested.tune import TuneRecipe
    from outsize.log import say
    from outsize.plan.probe import set_threads

    set_threads(load.threads)
    options = NestedOptions(
        model, tuple(own.data), own.widths, own.importance, own.blocks, own.tokens, own.every,
        own.resume, load.quiet, own.tune_until, load.memory,
    )  # fmt: skip
    recipe = NestedRecipe(
        steps=own.steps, batch=own.batch, rate=own.rate, seed=own.seed, share=own.target,
        labels=own.labels, rank=own.rank,
    )  # fmt: skip
    tuning = TuneRecipe(steps=own.tune, rate=own.tune_rate, seed=own.seed, share=own.target)
    made = run(options, recipe, tuning)
    print("\n".join(made.table))
    if not load.quiet:
        size, a = made.path.stat().st_size / 1e6, made.about
        say(
            f"wrote {made.path} ({size:.1f} MB; {a.trained_tokens:,} tokens, {a.minutes:.1f} minutes); use "
            f"it with `outsize run {made.pack.path} --width 0.75`"
        )


@app.command("masks", hidden=True)  # its earlier name
@app.command()
@with_flags
def mtp(
    train: TrainFlags,
    recipe: RecipeFlags,
    load: Annotated[LoadOptions, only("threads", "quiet", "memory")],
    given: frozenset[str],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """Multi-token prediction: train mask tokens with which a dense model drafts for itself."""
    from outsize.adapt.examples import TrainOptions
    from outsize.adapt.mtp.losses import MtpRecipe
    from outsize.adapt.mtp.task import MtpTask, work
    from outsize.adapt.run import run
    from outsize.plan.probe import set_threads

    check_answers(train.own_answers, given)
    set_threads(load.threads)
    wanted = MtpRecipe(**asdict(recipe))
    given_data = asdict(train) | {"data": tuple(train.data)}
    options = TrainOptions(model=model, quiet=load.quiet, memory=load.memory, **given_data)
    run(options, wanted, partial(MtpTask, wanted), partial(work, wanted, options))


for command in (distill.recover, distill.feature, distill.prune, distill.share_kv, align):
    app.command()(command)
