"""`outsize bench parallel`. Imports of anything heavy happen inside the command."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from outsize.cli.command import only, with_flags
from outsize.cli.flags import DisplayOptions, Flag
from outsize.options import DEFAULT_MODEL, LoadOptions


@dataclass(frozen=True, slots=True)
class ParallelFlags:
    """What to measure."""

    ways: Annotated[
        str | None, Flag("--ways", "Of --parallel, with ; between; by default the usual ones.")
    ] = None
    links: Annotated[
        str, Flag("--links", "RATE[,LATENCY] with ; between, modelled; none: as it is.")
    ] = "100Mbit/s,0.1ms"
    prompt_tokens: Annotated[int, Flag("--prompt-tokens", "Tokens to prefill.")] = 512
    new_tokens: Annotated[int, Flag("--new-tokens", "Tokens to decode.")] = 32
    repeats: Annotated[int, Flag("--repeats", "Measured runs.")] = 3
    search: Annotated[
        str,
        Flag(
            "--search", "Lengths of prompts, as 1024,2048: search cuts for runahead, and keep them."
        ),
    ] = ""


@with_flags
def parallel(
    own: ParallelFlags,
    display: Annotated[DisplayOptions, only("json")],
    load: Annotated[LoadOptions, only("ranks", "memory", "threads", "chunk", "native", "quiet")],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """Ways to share a model between ranks, side by side over links as slow as named."""
    from outsize.bench import parallel as measure

    given = {k: v for k, v in asdict(own).items() if v is not None}
    measure.show(model, measure.ParallelOptions(**given), load, display.json)
