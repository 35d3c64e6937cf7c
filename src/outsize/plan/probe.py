"""What this machine is and can do, measured."""

from __future__ import annotations

import mmap
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

DISK_BYTES = 256 << 20
READ_BYTES = 2 << 20
READERS = 4


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Those that decide which kernels run fast here."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.is_file() else []
    wanted = (
        "avx2",
        "fma",
        "avx512f",
        "avx512_bf16",
        "avx512_vnni",
        "amx_bf16",
        "asimd",
        "bf16",
        "i8mm",
    )
    return [name for name in wanted if name in flags]


def cores() -> int:
    """Processor cores this process may use."""
    count = getattr(os, "sched_getaffinity", None)
    allowed = len(count(0)) if count is not None else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def _median_s(work: Callable[[], object], repeats: int = 7) -> float:
    times = []
    work()
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def memory_bandwidth() -> float:
    """Bytes a second that all threads together read."""
    data = torch.ones(32 << 20, dtype=torch.int64)
    return data.nbytes / _median_s(data.sum)


def matmul_speed(dtype: torch.dtype = torch.bfloat16, rows: int = 512) -> float:
    """Operations a second of a large matrix product."""
    x, w = torch.randn(rows, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
    return 2 * rows * 4096 * 4096 / _median_s(lambda: torch.nn.functional.linear(x, w), 3)


def disk_bandwidth(folder: Path) -> float:
    """Bytes a second of direct reads by a few threads; of plain reads where direct is not offered."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as f:
        block = os.urandom(READ_BYTES)
        for _ in range(DISK_BYTES // READ_BYTES):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())
        started = time.perf_counter()
        _read_all(f.name)
        return DISK_BYTES / (time.perf_counter() - started)


def _read_all(path: str) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # some file systems refuse O_DIRECT
        handle = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda i: _read(handle, i), range(DISK_BYTES // READ_BYTES)))
    finally:
        os.close(handle)


def _read(handle: int, index: int) -> None:
    with mmap.mmap(-1, READ_BYTES) as buffer:  # page-aligned, as direct reads want
        os.preadv(handle, [buffer], index * READ_BYTES)
