"""Ways to share a model between two ranks, one beside the other over links that are modelled; with cuts of a
chain that are searched for.

    python -m experiments.parallel.ways MODEL.gguf [--ways "..."] [--links "..."] [--prompt 512] [--tokens 32]
        [--repeats 3] [--search 4096] [--memory 2GB] [--encoding auto] [--disk "as it is"] [-o FILE]

A row for each way and link (bench/parallel.py), each rank with a core of its own where there are two; of the
way `alone` for one rank with one. `head_s`: seconds of the head for a token, on one core; `others_cores`:
what others had of the machine meanwhile: rows beside which that was over a tenth are shown and not kept.
`--disk`: a word for the disk, where it is not as it is. Rows that FILE has are not measured again.
experiments/parallel/machines.py holds the simulator to two ranks.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from experiments.parallel.quiet import Quiet
from experiments.runs import arguments, record, recorded
from outsize.bench.parallel import ParallelOptions, measured
from outsize.bench.speed import measure
from outsize.engine import load as loading
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.plan.probe import median_s

ALONE, BUSY = "alone", 0.1
KEYS = "way", "link", "model", "memory", "prompt", "tokens", "encoding", "disk"


def rows(model: str, way: str, link: str, args: Any) -> Iterator[dict[str, Any]]:
    """Of one way and link."""
    how = LoadOptions(memory=args.memory, encoding=args.encoding, threads=1, quiet=True)
    sizes = args.prompt, args.tokens, args.repeats
    if way == ALONE:
        yield alone(model, how, sizes) | {"way": way, "link": "none"}
        return
    options = ParallelOptions(way, link, *sizes, args.search)
    for one in measured(model, options, how.with_changes({"ranks": 2})):
        yield one if isinstance(one, dict) else one.to_json()


def alone(model: str, how: LoadOptions, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """One rank, on one core."""
    prompt, tokens, repeats = sizes
    how = how.with_changes({"draft": "none", "prefix_cache": "off"})
    with loading.open_model(fetch.named(model), how) as opened, on_one_core():
        measure(opened, prompt, 2, 1)
        runs = [measure(opened, prompt, tokens, 1) for _ in range(repeats)]
        of_prompt, of_tokens = (statistics.median(run[i] for run in runs) for i in (0, 1))
        placement = opened.placement
        return {
            "prompt_s": round(prompt / of_prompt, 5), "token_s": round(1 / of_tokens, 6),
            "held": placement.held, "streamed": placement.streamed,
        }  # fmt: skip


@contextmanager
def on_one_core() -> Iterator[None]:
    """What computes in this process."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def head_seconds(model: str, encoding: str) -> float:
    """Of the head, for one row."""
    with (
        loading.load(model, quiet=True, draft="none", encoding=encoding, threads=1) as opened,
        torch.inference_mode(),
    ):
        transformer = opened.transformer
        state = torch.randn(1, transformer.description.width, dtype=torch.float32)
        return median_s(lambda: transformer.logits(state), 15)


def main() -> int:
    args = arguments(
        __doc__, "model", ways="tensor:cut=sum,attention=heads;tensor:cut=sum,bits=4",
        links="100Mbit/s,0.1ms", prompt=512, tokens=32, repeats=3, search="", memory="auto",
        encoding="auto", disk="as it is",
    )  # fmt: skip
    about = {"model": Path(args.model).stem, "memory": args.memory, "prompt": args.prompt}
    about |= {"tokens": args.tokens, "encoding": args.encoding, "disk": args.disk}
    known = [tuple(row.get(k) for k in KEYS) for row in recorded(args.output)]
    head_s, start = 0.0, time.monotonic()
    for link, way in (
        (link, way) for link in args.links.split(";") for way in args.ways.split(";")
    ):
        found = about | {"way": way, "link": "none" if way == ALONE else link}
        if tuple(found[k] for k in KEYS) in known:
            continue
        head_s, quiet = head_s or head_seconds(args.model, args.encoding), Quiet()
        for row in rows(args.model, way, link, args):
            others = quiet.others
            more = {"head_s": round(head_s, 6), "others_cores": round(others, 3)}
            more |= {"spent_s": round(time.monotonic() - start, 1)}
            record({**row, **about, **more}, args.output if others < BUSY else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
