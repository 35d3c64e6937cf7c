"""How many cores other processes had while something was measured, and what it usually took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import psutil


def usual(seconds: Sequence[float]) -> float:
    """The mean, without the first, which finds nothing in caches."""
    return fmean(seconds[1:])


class Quiet:
    """From when it is made: wall seconds, and cores that processes had that are not this one's own."""

    def __init__(self) -> None:
        self._start, self._all, self._own = time.monotonic(), _all(), _own()

    @property
    def others(self) -> float:
        """Cores, on average; below zero only by the clock's ticks."""
        took = max(1e-6, time.monotonic() - self._start)
        return ((_all() - self._all) - (_own() - self._own)) / took


def _all() -> float:
    times = psutil.cpu_times()
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "steal")))


def _own() -> float:
    """Of this process and those that it started."""
    root, total = psutil.Process(), 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total
