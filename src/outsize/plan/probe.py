"""Measure this machine: cores, memory bandwidth, arithmetic, disk. Times in seconds, rates a second."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

from outsize.arguments import whole
from outsize.kernels.threads import affinity
from outsize.plan.cores import Watch
from outsize.storage.buffers import BufferPool
from outsize.storage.file import File
from outsize.system.cgroups import quota

DISK_BYTES = 256 << 20
LEAST_REPEATS, PATIENCE_S = 7, 0.6  # of one measurement


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Names of the instruction sets that matter to our kernels, of those that are here."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.is_file() else []
    wanted = (
        "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "i8mm",
    )  # fmt: skip
    return [name for name in wanted if name in flags]


def allowed() -> int:
    """Logical processors that this process may use, by its affinity and the quota of its control groups. More
    threads than that would stand still together until the quota's next period begins."""
    by_mask, share = affinity(), quota()
    return by_mask if share is None else max(1, min(by_mask, round(share)))


def cores() -> int:
    """Physical cores that this process may use."""
    return min(allowed(), psutil.cpu_count(logical=False) or allowed())


def set_threads(threads: int | None = None) -> None:
    """Set torch's threads for the process; None: no more than `allowed`, unless the environment names a
    number. Raises OptionError."""
    if threads is not None:
        torch.set_num_threads(whole("threads", threads, 1, 1024))
    elif not os.environ.get("OMP_NUM_THREADS") and torch.get_num_threads() > allowed():
        torch.set_num_threads(allowed())


def median_s(work: Callable[[], object], repeats: int = 7) -> float:
    """Median time of a piece of work, after one run that is not counted."""
    times = []
    work()
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def best_s(work: Callable[[], object], watch: Watch | None = None) -> float:
    """Least time of a short piece of work over many runs: whatever else runs takes some milliseconds at a
    time. `watch` is told how far they lie apart."""
    times, until = list[float](), time.perf_counter() + PATIENCE_S
    work()
    while len(times) < LEAST_REPEATS or time.perf_counter() < until:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    if watch is not None:
        watch.compare(min(times), statistics.median(times))
    return min(times)


def memory_bandwidth(watch: Watch | None = None) -> float:
    """Bytes a second that all threads together read from memory, past the caches."""
    pieces = torch.ones(8, 4 << 20, dtype=torch.int64, device="cpu")
    at = itertools.cycle(pieces)
    return pieces[0].nbytes / best_s(lambda: next(at).sum(), watch)


def matmul_speed(
    dtype: torch.dtype, watch: Watch | None = None, rows: int = 512, width: int = 2048
) -> float:
    """Floating-point operations a second of a large matrix product."""
    made = (torch.randn(n, width, dtype=torch.float32, device="cpu") for n in (rows, width))
    x, w = (m.to(dtype) for m in made)
    return 2 * rows * width * width / best_s(lambda: torch.nn.functional.linear(x, w), watch)


def disk_curve(
    folder: Path, sizes: Sequence[int], counts: Sequence[int]
) -> list[tuple[int, int, float]]:
    """(bytes a read, threads, bytes a second) of direct reads; plain ones where direct is not offered."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as f:
        block = os.urandom(1 << 20)
        for _ in range(DISK_BYTES >> 20):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())
        return [(size, n, disk_rate(Path(f.name), size, n)) for size in sizes for n in counts]


def disk_rate(path: Path, size: int, threads: int, most: int = DISK_BYTES) -> float:
    """Bytes a second of reads of `size` bytes from a file's beginning, `most` bytes in all."""
    backend = File(path)
    count = max(1, min(most, backend.stamp()[0]) // size)
    buffers = BufferPool(threads, size)
    for i in range(threads):
        buffers[i][0].fill_(1)  # the engine's buffers have their memory, too
    try:
        with ThreadPoolExecutor(threads) as pool:
            started = time.perf_counter()
            list(pool.map(
                lambda i: _read(backend, buffers[i][1], range(i, count, threads), size),
                range(threads),
            ))  # fmt: skip
            return count * size / (time.perf_counter() - started)
    finally:
        backend.close()


def _read(backend: File, out: memoryview, indices: range, size: int) -> None:
    for i in indices:
        backend.read(out, i * size)
