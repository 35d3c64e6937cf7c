"""`outsize trace`: which experts a model uses, token by token, as `caching/replay/trace.py` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outsize.cli.command import only, with_flags
from outsize.cli.flags import Flag
from outsize.errors import OptionError, UnsupportedError
from outsize.log import say
from outsize.options import LoadOptions, Options

if TYPE_CHECKING:
    from outsize.pack.format import Pack

EXACT = LoadOptions(draft="none")  # a draft token is not what was said
SHORT = Options(max_tokens=64)


@dataclass(frozen=True, slots=True)
class TraceFlags:
    """What is answered, and where the trace goes."""

    prompts: Annotated[Path, Flag("--prompts", "A prompt a line (or JSON with `prompt`).")]
    output: Annotated[Path, Flag("-o --output", "The trace, as CSV.")]


@with_flags
def trace(
    own: TraceFlags,
    model: Annotated[str, typer.Argument()],
    request: Annotated[Options, only("max_tokens", "raw")] = SHORT,
    load: Annotated[LoadOptions, only("context", "threads", "memory", "experts", "quiet")] = EXACT,
) -> None:
    """Record which experts a model uses on your own prompts, for `outsize bench cache`."""
    from outsize.caching.replay.record import COLUMNS, Recorder
    from outsize.engine.load import open_model
    from outsize.progress import bars
    from outsize.text import prompt_file

    texts = [line.prompt for line in prompt_file.read([own.prompts], OptionError)]
    with open(own.output, "w", encoding="utf-8", newline="") as out:
        recorder = Recorder(out)
        with open_model(model, load, recorder) as opened, bars(load.quiet) as progress:
            out.write(_header(opened.pack))
            out.write(",".join(COLUMNS) + "\n")
            for turn, text in enumerate(texts):
                recorder.begin(turn)
                opened.generate(text, max_tokens=request.max_tokens, raw=request.raw)
                progress("tracing", turn + 1, len(texts))
    if not load.quiet:
        say(
            f"wrote {own.output}: {len(texts)} prompts; "
            f"replay it with `outsize bench cache {own.output}`"
        )


def _header(pack: Pack) -> str:
    d = pack.description
    if d.mixture is None:
        raise UnsupportedError(
            f"{pack.path.name} has no experts to trace; give a mixture-of-experts model"
        )
    stride = max(t.stride for t in pack.tables if t.kind == "experts")
    return (
        "# route_trace v1\n"
        f"# model={pack.path.name} n_layer={len(d.routed)} n_expert={d.mixture.count} "
        f"n_expert_used={d.mixture.used}\n# expert_bytes={stride}\n"
    )
