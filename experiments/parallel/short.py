"""What short sums cost: perplexity of a model by two ranks of the engine, with sums in few bits.

    python -m experiments.parallel.short MODEL.gguf TEXT.txt [--ranks 2] [--chunks 16] [--length 256]
        [-o FILE]

The ranks are threads of one process (adapt/sync/ranks.py), on the text's beginning. A row for each way:
perplexity, and its change against exact sums in per cent, with two standard errors around it, over chunks.
Rows that FILE has are not measured again.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch

from experiments.runs import arguments, record, recorded
from outsize.adapt.calibration import start_of
from outsize.adapt.statistics import sequences
from outsize.adapt.sync.means import interval, mean_of, minus
from outsize.adapt.sync.ranks import opened
from outsize.engine import open_tokens
from outsize.home import home
from outsize.pack import fetch
from outsize.parallel import split
from outsize.parallel.points import Points

WAYS = {
    "tensor:cut=sum": ("whole", 16), "tensor:cut=sum,bits=4": ("whole", 4),
    "tensor:cut=sum,bits=5": ("whole", 5), "tensor:cut=sum,attention=heads,bits=4": ("heads", 4),
}  # fmt: skip


def main() -> int:
    args = arguments(__doc__, "model", "text", ranks=2, chunks=16, length=256)
    torch.set_num_threads(1)
    pack = fetch.pack(args.model, quiet=True)
    encode, start = open_tokens.tokens(pack).encode, start_of(pack)
    text = Path(args.text).read_text(encoding="utf-8")[: args.chunks * args.length * 8]
    ids_BT = sequences(encode(text, start=False), start, args.length)[: args.chunks]
    about = {"model": Path(args.model).stem, "ranks": args.ranks, "tokens": ids_BT.numel()}
    found = {row["way"]: row["losses"] for row in recorded(args.output, about)}
    equal = split.Ranks((1.0,) * args.ranks)
    for way, (attention, bits) in WAYS.items():
        if way in found:
            continue
        began = time.monotonic()
        how = split.Way("sum", attention)
        shards = split.split(pack.path.name, pack.description, pack.tables, equal, how)
        with opened(pack, shards, home()) as ranks:
            found[way] = ranks.losses(ids_BT, lambda _, bits=bits: Points(rest=bits))  # type: ignore[misc]
        rises = minus(found[way], found["tensor:cut=sum"])
        low, high = interval(rises)
        change = [round(100 * math.expm1(x), 3) for x in (mean_of(rises), low, high)]
        row = {
            **about, "way": way, "perplexity": round(math.exp(mean_of(found[way])), 3),
            "change": change[0], "change_low": change[1], "change_high": change[2],
            "losses": [round(x, 6) for x in found[way]], "seconds": round(time.monotonic() - began),
        }  # fmt: skip
        record(row, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
