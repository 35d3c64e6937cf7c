"""What packing and adding up sums in few bits costs: processor time of one core, the least of several.

    python -m experiments.parallel.codecs [-o FILE]

A row for each codec, width and number of rows: microseconds to pack one rank's rows and to add up two ranks',
bytes a row, and from which links on it pays: a link slower than so many Mbit/s saves more than this costs,
against bf16.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

from experiments.runs import arguments
from outsize.kernels.find import find
from outsize.kernels.plain import PLAIN
from outsize.kernels.turned import BITS, row_bytes, turner
from outsize.parallel.collective import Point
from outsize.parallel.exact import sum_in_order
from outsize.parallel.static import Ranges, Static

WIDTHS, ROWS, AT = (576, 896, 1536), (1, 8, 512), Point(0, "ffn")


def microseconds(call: Callable[[], object], count: int) -> float:
    best = float("inf")
    for _ in range(7):
        start = time.thread_time()
        for _ in range(count):
            call()
        best = min(best, (time.thread_time() - start) / count)
    return round(best * 1e6, 1)


def measure(codec: str, width: int, rows: int, bits: int) -> dict[str, object]:
    made = torch.Generator().manual_seed(1)
    x, count = torch.randn(rows, width, generator=made).bfloat16(), max(3, 1000 // rows)
    plain = microseconds(lambda: sum_in_order([x, x]), count)
    if codec == "static":
        ranges = Ranges(2, width)
        for rank in range(2):
            ranges.see(rank, x if rows > 1 else torch.randn(64, width, generator=made))
        static = Static(0, {AT: ranges.table()})
        message = static.pack(x, AT)
        pack = microseconds(lambda: static.pack(x, AT), count)
        add = microseconds(lambda: static.sum([message, message], width, AT), count)
    else:
        turning = turner(bits, find() if codec == "turned, C" else PLAIN)
        message = turning.pack(x)
        assert message.shape[1] == row_bytes(width, bits)
        pack = microseconds(lambda: turning.pack(x), count)
        add = microseconds(lambda: turning.sum([message, message], width), count)
    saved, cost = 2 * width - message.shape[1], (pack + add - plain) / rows
    return {
        "codec": codec, "bits": bits, "width": width, "rows": rows, "bytes_a_row": message.shape[1],
        "bits_a_number": round(8 * message.shape[1] / width, 4), "pack_us": pack, "sum_of_two_us": add,
        "bf16_sum_us": plain, "pays_below_mbit": round(8 * saved / cost) if cost > 0 else None,
    }  # fmt: skip


def main() -> int:
    args, rows = arguments(__doc__), []
    torch.set_num_threads(1)
    for width in WIDTHS:
        for count in ROWS:
            wanted = [("turned, C", bits) for bits in BITS] + [("turned, torch", 4), ("static", 4)]
            rows += [measure(codec, width, count, bits) for codec, bits in wanted]
    lines = [json.dumps(row) for row in rows]
    print("\n".join(lines))
    if args.output is not None:
        args.output.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
