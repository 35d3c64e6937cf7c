"""`outsize adapt sync`. Imports of anything heavy happen inside the command."""

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
class SyncFlags:
    """What to measure on, and what it may cost."""

    data: Annotated[list[Path], Flag("--data", "Text, or prompts: .txt or .jsonl (repeatable).")]
    output: Annotated[
        Path | None,
        Flag("-o --output", "The add-on file; by default beside the pack, for drop=auto."),
    ] = None
    link: Annotated[
        str, Flag("--link", "Between ranks, as 100Mbit/s or 1Gbit/s,0.2ms: what is chosen for.")
    ] = "100Mbit/s,0.1ms"
    gate: Annotated[
        float, Flag("--gate", "Percent of perplexity that it may cost; more is not written.")
    ] = 1.0
    rank: Annotated[int, Flag("--rank", "Of corrections, in closed form; 0: none.")] = 64
    tokens: Annotated[int, Flag("--tokens", "Of the data, that are read.")] = 32768
    length: Annotated[int, Flag("--length", "Tokens of a sequence.")] = 512
    sweep: Annotated[int, Flag("--sweep", "Sequences that each layer is measured on.")] = 4
    distill: Annotated[
        int, Flag("--distill", "Steps that the corrections of sensitive layers learn; 0: none.")
    ] = 0
    group: Annotated[
        bool, Flag("--group", "Put key heads together on a rank that miss the others least.")
    ] = False
    allow: Annotated[bool, Flag("--allow", "Write the file even if it costs more.")] = False
    resume: Annotated[bool, Flag("--resume", "Go on from what was measured.")] = False


@with_flags
def sync(
    own: SyncFlags,
    load: Annotated[LoadOptions, only("threads", "quiet", "ranks")],
    display: Annotated[DisplayOptions, only("json")],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """Fewer and shorter messages between ranks: which sums a model can do without (Sync-Point Drop)."""
    from outsize.adapt.sync.run import SyncOptions, run
    from outsize.log import say
    from outsize.plan.probe import set_threads

    set_threads(load.threads)
    given = asdict(own) | {"data": tuple(own.data)}
    made = run(SyncOptions(model=model, ranks=load.ranks, quiet=load.quiet, **given))
    print(json.dumps(made.about.to_json()) if display.json else "\n".join(made.table))
    if not load.quiet:
        say(
            f"wrote {made.path}; use it with --ranks {load.ranks} --parallel tensor:sync={made.path}"
        )
