"""`outsize trace`: which experts a model uses, or which bundles of neurons, token by token, as
`caching/replay/trace.py` reads them."""

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
    from outsize.engine.model import Model

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
    load: Annotated[
        LoadOptions, only("context", "threads", "memory", "experts", "neurons", "quiet")
    ] = EXACT,
) -> None:
    """Record which experts (or, with --neurons, neurons) a model uses on your own prompts, for `outsize bench
    cache`."""
    from outsize.caching.replay.record import COLUMNS, Recorder
    from outsize.engine.load import open_model
    from outsize.progress import bars
    from outsize.text import prompt_file

    texts = [line.prompt for line in prompt_file.read([own.prompts], OptionError)]
    with open(own.output, "w", encoding="utf-8", newline="") as out:
        recorder = Recorder(out)
        with open_model(model, load, recorder) as opened, bars(load.quiet) as progress:
            out.write(_header(opened))
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


def _header(model: Model) -> str:
    pack, d = model.pack, model.pack.description
    banks = model.transformer.loaded.neurons
    if d.mixture is not None:
        layers, count, used = len(d.routed), d.mixture.count, d.mixture.used
        stride = max(t.stride for t in pack.tables if t.kind == "experts")
    elif banks:
        layers, count = d.num_layers, banks[0].form.count
        used = count
        stride = max(bank.form.stride for bank in banks)
    else:
        raise UnsupportedError(
            f"{pack.path.name} has no experts to trace, and no neurons are paged; give a mixture-of-experts "
            "model, or --neurons FILE"
        )
    return (
        "# route_trace v1\n"
        f"# model={pack.path.name} n_layer={layers} n_expert={count} "
        f"n_expert_used={used}\n# expert_bytes={stride}\n"
    )
