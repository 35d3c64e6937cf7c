"""`outsize adapt ...`: recipes. Imports of anything heavy happen inside the commands."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from outsize.cli import distill
from outsize.cli.adapt_relu import relu
from outsize.cli.align import align
from outsize.cli.command import only, with_flags
from outsize.cli.distill import check_answers
from outsize.cli.flags import DisplayOptions, Flag
from outsize.errors import OptionError
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


@dataclass(frozen=True, slots=True)
class MemoryFlags:
    """A table to make, or a model to train."""

    tables: Annotated[
        str | None,
        Flag("--tables", "Turn this model's feed-forwards into a table of rows by token."),
    ] = None
    bits: Annotated[int, Flag("--bits", "With --tables: of a number, 16, 8 or 4.")] = 16
    rank: Annotated[
        float | None, Flag("--rank", "With --tables: of a low rank, its share of the width.")
    ] = None
    by_layer: Annotated[bool, Flag("--by-layer", "With --rank: more where more would be lost.")] = (
        False
    )
    data: Annotated[
        list[Path] | None,
        Flag("--data", "Text to train on, or whose tokens order a table's rows (repeatable)."),
    ] = None
    config: Annotated[
        str | None,
        Flag("--config", "Train a model of this size from nothing: tiny or small.", has_env=False),
    ] = None
    flex: Annotated[
        int,
        Flag(
            "--flex",
            "With --config: of each feed-forward, width^2 numbers that read the context: 0 to 3.",
        ),
    ] = 0
    output: Annotated[
        Path | None, Flag("-o --output", "With --config: the folder of the trained model.")
    ] = None
    steps: Annotated[int, Flag("--steps", "With --config: steps.")] = 2000
    batch: Annotated[int, Flag("--batch", "With --config: sequences a step.")] = 8
    rate: Annotated[float, Flag("--rate", "With --config: highest learning rate.")] = 2e-3
    length: Annotated[int, Flag("--length", "With --config: tokens of a sequence.")] = 256
    seed: Annotated[int, Flag("--seed", "With --config: the same seed trains the same model.")] = 0
    every: Annotated[int, Flag("--every", "With --config: steps between checkpoints.")] = 100
    resume: Annotated[bool, Flag("--resume", "With --config: go on from the checkpoint.")] = False
    device: Annotated[str, Flag("--device", "With --config: auto, cpu or cuda.")] = "auto"


OF_TABLES = ("bits", "rank", "by_layer")
OF_TRAINING = (
    "flex", "output", "steps", "batch", "rate", "length", "seed", "every", "resume", "device",
)  # fmt: skip


@app.command()
@with_flags
def memory(
    own: MemoryFlags,
    load: Annotated[LoadOptions, only("threads", "quiet")],
    display: Annotated[DisplayOptions, only("json")],
    given: frozenset[str],
) -> None:
    """Feed-forwards as tables (MemoryLLM): train a small model whose feed-forwards read the token alone, or
    turn such a model's feed-forwards into a table, from which each token is one read."""
    from outsize.plan.probe import set_threads

    if (own.tables is None) == (own.config is None):
        raise OptionError(
            "give --tables MODEL to make a model's table, or --config tiny --data FILE -o FOLDER to train one"
        )
    others = OF_TRAINING if own.config is None else OF_TABLES
    for name in others:
        if name in given:
            what = "--config, which trains" if own.config is None else "--tables, which makes one"
            raise OptionError(f"--{name.replace('_', '-')} is of {what}; leave it out")
    set_threads(load.threads)
    if own.config is None:
        _make_table(own, load.quiet, display.json)
    else:
        _train_memory(own, load.quiet, display.json)


def _make_table(own: MemoryFlags, quiet: bool, as_json: bool) -> None:
    from outsize.adapt.memory.tables import TableOptions, make_tables
    from outsize.pack import fetch

    options = TableOptions(own.bits, own.rank, own.by_layer, tuple(own.data or ()), quiet)
    base = fetch.pack(str(own.tables), quiet=quiet)
    made = make_tables(base, options)
    pack = made.pack
    table = next(t for t in pack.tables if t.kind == "tokens")
    if as_json:
        told = {"name": pack.path.name, "path": str(pack.path), "minutes": made.minutes}
        print(
            json.dumps(
                told | {"bytes": pack.size, "table_bytes": table.size, "row_bytes": table.stride}
            )
        )
        return
    took = "made before" if made.minutes is None else f"{made.minutes:.1f} minutes"
    print(
        f"{pack.path.name}: {table.num_rows:,} rows in records of {table.stride:,} bytes, table "
        f"{table.size / 1e6:,.1f} MB, pack {pack.size / 1e6:,.1f} MB (the model without it "
        f"{base.size / 1e6:,.1f}), {took}; run it with -m {pack.path}"
    )


def _train_memory(own: MemoryFlags, quiet: bool, as_json: bool) -> None:
    from outsize.adapt.memory.task import MemoryRecipe
    from outsize.adapt.memory.train import MemoryOptions, train

    if own.output is None:
        raise OptionError("-o names no folder for the trained model; give -o FOLDER")
    recipe = MemoryRecipe(
        steps=own.steps, batch=own.batch, rate=own.rate, length=own.length, seed=own.seed,
        config=str(own.config), flex=own.flex,
    )  # fmt: skip
    data = tuple(own.data or ())
    options = MemoryOptions(data, own.output, own.every, own.resume, own.device, quiet)
    training = train(options, recipe)
    if as_json:
        told = {"path": str(own.output), "step": training.step, "loss": training.loss}
        print(json.dumps(told | training.figures))


app.command()(relu)


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


@app.command("masks", hidden=True)  # its earlier name
@app.command()
@with_flags
def mtp(
    train: TrainFlags,
    recipe: RecipeFlags,
    load: Annotated[LoadOptions, only("threads", "quiet")],
    given: frozenset[str],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """Multi-token prediction: train mask tokens with which a dense model drafts for itself."""
    from outsize.adapt.examples import TrainOptions
    from outsize.adapt.mtp.losses import MtpRecipe
    from outsize.adapt.mtp.task import MtpTask
    from outsize.adapt.run import run
    from outsize.plan.probe import set_threads

    check_answers(train.own_answers, given)
    set_threads(load.threads)
    wanted = MtpRecipe(**asdict(recipe))
    given_data = asdict(train) | {"data": tuple(train.data)}
    options = TrainOptions(model=model, quiet=load.quiet, **given_data)
    run(options, wanted, partial(MtpTask, wanted))


for command in (distill.recover, distill.feature, distill.prune, distill.share_kv, align):
    app.command()(command)
