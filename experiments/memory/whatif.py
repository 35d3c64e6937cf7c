"""Does `plan --what-if` foretell tokens/s? `python -m experiments.memory.whatif MODEL... -o FILE`.

For each model and setting (bits=3.5, kv=int8, rank=8) runs of what was foretold, of 96 tokens behind a prompt
of 480, and predictions, in turn: what a shared machine gives differs from second to second, so each
prediction is set against the mean of the runs before and behind it, and the median of these ratios counts.
`--made width=2/3:PACK,...`: packs that are there already; others are made here, which of few bits takes long.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

import outsize
from experiments.runs import arguments, record
from outsize.adapt.distill.factors import nothing
from outsize.adapt.repack import BitsOptions, repack
from outsize.checkpoint.lora import KEY
from outsize.engine.model import Model
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.plan.compare import compare

PROMPT, NEW, TRIES = 480, 96, 7
SETTINGS = ("bits=3.5", "kv=int8", "rank=8")


@contextmanager
def opened(base: Pack, setting: str, made: str, folder: Path, text: Path) -> Iterator[Model]:
    """What was foretold, open. `made`: its pack's path, or none."""
    key, _, value = setting.partition("=")
    path, more = Path(made) if made else base.path, {}
    if key == "bits" and not made:
        few = BitsOptions(float(value), calibrate=text, force=True, quiet=True)
        path = repack(base, few).pack.path
    if key == "kv":
        more = {"kv": value}
    if key == "rank":
        file = folder / f"{base.path.name}-{value}.safetensors"
        about = {"rows": "adjacent", "scale": 1.0, "base": base.source.sha256}
        factors = nothing(base.description, int(value), 0)
        save_file({k: v.bfloat16() for k, v in factors.items()}, file, {KEY: json.dumps(about)})
        more = {"adapters": {"x": file}}
    with outsize.load(
        str(path), quiet=True, draft="none", prefix_cache="off", context=1024, **more
    ) as model:  # type: ignore[arg-type]
        yield model


def tokens_per_s(model: Model, text: str, adapter: str | None) -> float:
    """Of one run."""
    reply = model.generate(text, raw=True, max_tokens=NEW, adapter=adapter, temperature=0)[0]
    return reply.tokens_per_s if reply.new_tokens > NEW // 2 else 0.0


def main() -> None:
    args = arguments(__doc__, "models+", text=Path, folder=Path, settings=list(SETTINGS), made="")
    made = dict(one.rsplit(":", 1) for one in args.made.split(",") if one)
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in args.models:
        base = fetch.pack(name, quiet=True)
        for setting in args.settings:
            with opened(base, setting, made.get(setting, ""), args.folder, args.text) as model:
                ids = model.tokens.encode(args.text.read_text()[: 12 * PROMPT])[:PROMPT]
                words = model.tokens.decode(ids)
                adapter = "x" if setting.startswith("rank") else None
                measured, foretold = [tokens_per_s(model, words, adapter)], list[float]()
                for _ in range(TRIES):
                    options = LoadOptions(quiet=True, draft="none", context=1024, threads=1)
                    foretold.append(1 / compare(name, options, setting, PROMPT).then.token_s)
                    measured.append(tokens_per_s(model, words, adapter))
                beside = [statistics.mean(two) for two in pairwise(measured)]
                ratios = [f / m for f, m in zip(foretold, beside, strict=True)]
                row = {
                    "model": Path(name).name, "setting": setting, "threads": 1,
                    "foretold": foretold, "measured": measured,
                    "ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)],
                }  # fmt: skip
            record(row, args.output)


if __name__ == "__main__":
    main()
