"""Ways to share a model between two ranks, one beside the other over links that are modelled; with cuts of a
chain that are searched for, and what the simulator foretells of each.

    python -m experiments.parallel.ways MODEL.gguf [--ways "..."] [--links "..."] [--prompt 512] [--tokens 32]
        [--repeats 3] [--search 4096] [--memory 2GB] [-o FILE]

A row for each way and link (bench/parallel.py), and for tensor parallelism with both sums or one what the
simulator (parallel/des.py) says of a token, fed with the leader's own time: what it did not wait, less its
head. The simulator adds the links, the messages and the waiting.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from experiments.runs import arguments
from outsize.bench.parallel import ParallelOptions, Row, measured
from outsize.engine import load as loading
from outsize.kernels.turned import row_bytes
from outsize.options import LoadOptions
from outsize.parallel.des import Compute, Op, Receive, Send, simulate
from outsize.parallel.programs import Layer, Tensor
from outsize.parallel.slow import Link, parse_link
from outsize.parallel.spec import parse_parallel
from outsize.plan.probe import median_s

FRAME = 512  # bytes that tell the others of a step


def foretold(row: Row, model: str, head_s: float, call_s: float) -> float | None:
    """Seconds of a token by the simulator; None where it has no program for a way, or a link is not
    modelled."""
    spec = parse_parallel(row.way)
    if spec.way.cut != "sum" or spec.sync or row.link == "loopback":
        return None
    found = loading.fetch.pack(model, quiet=True)  # type: ignore[attr-defined]
    d = found.description
    own_s = max(0.0, row.token_s - row.waited_s - head_s)
    each = Layer(own_s / d.num_layers / 3, 2 * own_s / d.num_layers / 3)
    size = 2 * d.width if spec.bits == 16 else row_bytes(d.width, spec.bits)
    tensor = Tensor(d.num_layers, each, size, whole=spec.way.attention == "whole")
    lead: list[Op] = [Send(1, FRAME), *tensor.program(0, 2), Compute(head_s)]
    follow: list[Op] = [Receive(0, FRAME), *tensor.program(1, 2)]
    link: Link = parse_link(row.link)
    return simulate([lead, follow], link, call_s)[0].end


def head_seconds(model: str) -> float:
    """Of the head, for one row."""
    with loading.load(model, quiet=True, draft="none") as opened, torch.inference_mode():
        transformer = opened.transformer
        state = torch.randn(1, transformer.description.width, dtype=torch.float32)
        return median_s(lambda: transformer.logits(state), 15)


def main() -> int:
    args = arguments(
        __doc__, "model", ways="tensor:cut=sum,attention=heads;tensor:cut=sum,bits=4",
        links="100Mbit/s,0.1ms", prompt=512, tokens=32, repeats=3, search="", memory="auto", call=1e-5,
    )  # fmt: skip
    options = ParallelOptions(
        args.ways, args.links, args.prompt, args.tokens, args.repeats, args.search
    )
    load = LoadOptions(ranks=2, memory=args.memory, threads=1, quiet=True)
    head_s, start = head_seconds(args.model), time.monotonic()
    for one in measured(args.model, options, load):
        row: dict[str, Any] = one if isinstance(one, dict) else one.to_json()
        if isinstance(one, Row):
            guess = foretold(one, args.model, head_s, args.call)
            row |= {
                "simulated_s": None if guess is None else round(guess, 6),
                "head_s": round(head_s, 6),
            }
        row |= {"model": Path(args.model).stem, "prompt": args.prompt, "memory": args.memory}
        line = json.dumps({**row, "seconds": round(time.monotonic() - start, 1)})
        print(line, flush=True)
        if args.output is not None:
            with args.output.open("a") as out:
                out.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
