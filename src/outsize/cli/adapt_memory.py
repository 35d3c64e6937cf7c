"""`outsize adapt memory`. Imports of anything heavy happen inside the command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from outsize.cli.command import only, with_flags
from outsize.cli.flags import DisplayOptions, Flag
from outsize.errors import OptionError
from outsize.options import LoadOptions


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
        Flag(
            "--config",
            "Train a model of this size from nothing: mini, tiny or small.",
            has_env=False,
        ),
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
