"""Products of one large matrix by encoding and number of rows, in turn, next to a plain read of memory:
`python -m experiments.engine.products [--encodings q4_k,int4 --rows 1,4,8,16,48] -o FILE.jsonl`.

One row for each: the median and the least of milliseconds, bytes and weights a second, and the share of a
plain read's bytes a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from experiments.runs import Row, arguments, record
from outsize.encoding.find import encoding
from outsize.kernels.backend import Backend, Product
from outsize.kernels.find import find
from outsize.plan import probe


def product(name: str, rows: int, width: int, backend: Backend) -> tuple[Product, int]:
    """Of a matrix of random codes; its bytes."""
    e, fields = encoding(name, backend), {}
    for key, spec in e.specs(rows, width).items():
        field = torch.empty(spec.shape, dtype=spec.dtype)
        fields[key] = field.fill_(0.01) if spec.dtype.is_floating_point else field.random_(0, 100)
    return e.product(fields), sum(f.nbytes for f in fields.values())


def seconds(work: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    a = arguments(
        __doc__, encodings="int4,group4,group8,q8_0,q6_k,q5_k,q4_k,q4_0,iq4_xs,q3_k,q2_k,tq",
        rows="1,4,8,16,48", outputs=65_536, width=4096, repeats=15, threads=2,
    )  # fmt: skip
    backend = find()
    torch.set_num_threads(a.threads)
    backend.set_threads(a.threads)
    made = {name: product(name, a.outputs, a.width, backend) for name in a.encodings.split(",")}
    weights = a.outputs * a.width
    for count in map(int, a.rows.split(",")):
        x = torch.randn(count, a.width).bfloat16()
        took: dict[str, list[float]] = {name: [] for name in made}
        reads = []
        for _ in range(a.repeats):
            reads.append(probe.memory_bandwidth())
            for name, (multiply, _) in made.items():
                took[name].append(seconds(partial(multiply, x, False)))
        read = statistics.median(reads)
        for name, (_, size) in made.items():
            s = statistics.median(took[name])
            row: Row = {
                "processor": probe.processor(), "backend": backend.name, "encoding": name, "rows": count,
                "outputs": a.outputs, "width": a.width, "ms": s * 1e3, "least_ms": min(took[name]) * 1e3,
                "bits": 8 * size / weights, "bytes_per_s": size / s, "read_bytes_per_s": read,
                "read_share": size / s / read, "weights_per_ns": weights / s / 1e9,
                "gflops": 2 * count * weights / s / 1e9,
            }  # fmt: skip
            record(row, a.output)


if __name__ == "__main__":
    main()
