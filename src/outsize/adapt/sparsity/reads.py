"""What beginning a read costs on the disk that bundles lie on, in bundles that are read along: measured with
the engine's own reader, all of whose threads are busy.

A read of n bundles takes start + n * each seconds; the gap is start / each.
"""

from __future__ import annotations

import time

from outsize.kernels.backend import Backend
from outsize.storage.buffers import BufferPool
from outsize.storage.reader import THREADS, Reader
from outsize.storage.stats import IOStats
from outsize.storage.table import Table
from outsize.storage.tickets import Ticket
from outsize.weights.bundles import Bundles

LONG = 8  # bundles of a long read
SAMPLE, REPEATS = (
    12 << 20,
    5,
)  # bytes that a repetition reads, and repetitions, of which the fastest counts
MOST = 64.0


def gap_of(bundles: Bundles, backend: Backend) -> float:
    """Of the largest table. Raises PackError, ReadError."""
    found = max(bundles.tables, key=lambda t: t.bundles.size)
    table = Table(bundles.path, found.bundles, IOStats(), "never")
    long = max(2, min(LONG, len(table) // (2 * THREADS)))
    try:
        with Reader(backend=backend) as reader:
            short_s, long_s = seconds(reader, table, 1), seconds(reader, table, long)
    finally:
        table.close()
    each = (long_s - short_s) / (long - 1)
    start = short_s - each
    return MOST if each <= 0 else min(MOST, max(0.0, start / each))


def seconds(reader: Reader, table: Table, count: int) -> float:
    """Of a read of so many bundles, where others are under way: the least of some repetitions. All of a table
    is read from, in strides, so that neighbours follow each other late."""
    stride = table.header.stride
    reads = max(1, min(len(table) // count, SAMPLE // (count * stride)))
    firsts = [i * (len(table) // count) // reads * count for i in range(reads)]
    firsts = [f for k in range(7) for f in firsts[k::7]]
    buffers = BufferPool(count * 2 * THREADS, stride)
    buffers.populate()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        _read(reader, table, firsts, count, buffers)
        times.append(time.perf_counter() - began)
    return min(times) / reads


def _read(reader: Reader, table: Table, firsts: list[int], count: int, buffers: BufferPool) -> None:
    tickets = list[list[Ticket]]()
    for n, first in enumerate(firsts):
        if n >= 2 * THREADS:
            for ticket in tickets[n - 2 * THREADS]:
                ticket.wait()
        at = n % (2 * THREADS) * count
        outs = [buffers.view(at + i) for i in range(count)]
        joined = reader.submit_scattered(table, first, outs, True) if count > 1 else None
        each = (
            [reader.submit(table, first + i, out) for i, out in enumerate(outs)]
            if joined is None
            else []
        )
        tickets.append(each if joined is None else [joined])
    for some in tickets:
        for ticket in some:
            ticket.wait()
