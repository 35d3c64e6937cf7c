"""`outsize trace`: which experts a model uses, token by token, as `caching/replay/trace.py` reads them."""

from __future__ import annotations

from pathlib import Path

from outsize.caching.replay.record import COLUMNS, Recorder
from outsize.engine import load as loading
from outsize.errors import OptionError, UnsupportedError
from outsize.log import say
from outsize.options import LoadOptions
from outsize.pack.format import Pack
from outsize.progress import bars
from outsize.text import prompt_file


def record(
    name: str,
    load_options: LoadOptions,
    threads: int | None,
    prompts: Path,
    output: Path,
    new: int,
    raw: bool,
) -> None:
    """Answer every prompt and write the trace. Raises OptionError, UnsupportedError."""
    texts = [line.prompt for line in prompt_file.read([prompts], OptionError)]
    with open(output, "w", encoding="utf-8", newline="") as out:
        recorder = Recorder(out)
        with loading.load(
            name, memory=load_options.memory, context=load_options.context, threads=threads,
            quiet=load_options.quiet,
            experts=load_options.experts, defaults=load_options.defaults, recorder=recorder,
            draft="none",  # a guess is not what was said
        ) as model, bars(load_options.quiet) as progress:  # fmt: skip
            out.write(_header(model.pack))
            out.write(",".join(COLUMNS) + "\n")
            for turn, text in enumerate(texts):
                recorder.begin(turn)
                model.generate(text, max_tokens=new, raw=raw)
                progress("tracing", turn + 1, len(texts))
    if not load_options.quiet:
        say(f"wrote {output}: {len(texts)} prompts; replay it with `outsize bench cache {output}`")


def _header(pack: Pack) -> str:
    d = pack.description
    if d.mixture is None:
        raise UnsupportedError(
            f"{pack.path.name} has no experts to trace; give a mixture-of-experts model"
        )
    stride = max(t.stride for t in pack.tables if t.kind == "experts")
    return (
        "# route_trace v1\n"
        f"# model={pack.path.name} n_layer={d.num_layers} n_expert={d.mixture.count} "
        f"n_expert_used={d.mixture.used}\n# expert_bytes={stride}\n"
    )
