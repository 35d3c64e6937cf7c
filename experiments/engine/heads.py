"""Each head's numbers times its own matrix, of one row: torch's ways and the C function, by processor time of
one thread, over weights that no cache holds: `python -m experiments.engine.heads [--repeats 100] -o FILE`.

The sizes are GLM 4.7 Flash's: keys' map (512 x 192 of each of 20 heads) and values' (256 x 512).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from experiments.engine.blocks import processor_s
from experiments.runs import arguments, record
from outsize.kernels.find import find
from outsize.kernels.plain import PLAIN
from outsize.log import warn_once
from outsize.plan import probe

HEADS, COPIES = 20, 12
SIZES = {"keys": (512, 192), "values": (256, 512)}
Way = Callable[[Tensor, Tensor], Tensor]


def turned(x_THK: Tensor, w_HNK: Tensor) -> Tensor:
    """The matrix as it lies, times a column."""
    return torch.bmm(w_HNK, x_THK[0, :, :, None])


def one_by_one(x_THK: Tensor, w_HNK: Tensor) -> Tensor:
    """A linear map a head."""
    return torch.stack([linear(x, w) for x, w in zip(x_THK[0], w_HNK, strict=True)])


def main() -> None:
    a = arguments(__doc__, repeats=100)
    torch.set_num_threads(1)
    native = find(True, warn_once)
    native.set_threads(1)
    ways: dict[str, Way] = {
        "bmm": PLAIN.heads, "bmm, turned": turned, "one by one": one_by_one, "C": native.heads,
    }  # fmt: skip
    for what, (rows, width) in SIZES.items():
        x_THK = torch.randn(1, HEADS, width).bfloat16()
        copies = [torch.randn(HEADS, rows, width).bfloat16() for _ in range(COPIES)]
        for name, way in ways.items():
            each = itertools.cycle(copies)
            times = [processor_s(lambda: way(x_THK, next(each))) for _ in range(a.repeats)]  # noqa: B023
            ms = statistics.median(times) * 1e3
            record(
                {"processor": probe.processor(), "map": what, "way": name, "ms": ms,
                 "least_ms": min(times) * 1e3, "bytes": copies[0].nbytes}, a.output,
            )  # fmt: skip


if __name__ == "__main__":
    main()
