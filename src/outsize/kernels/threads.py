"""How many threads the kernels use: the cores that other programs leave free.

A kernel's loop ends when its last thread does. If another program runs where one of them should, the others
wait for it: beside one busy program on two cores, two threads kept a quarter of their rate where one keeps
three quarters. So what others use is looked at several times a second, from the system's counts of time
(`/proc/stat`) less this process's own. Kernels give the same bits with any number of threads; torch's
products do not, and keep theirs.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from outsize.kernels.build import mapped

PERIOD = 0.2  # seconds between looks
SOON, LATE = 2.0, 30.0  # seconds until all threads are tried again: at first, and at most
SPARE = 0.35  # cores that others may use before a thread less is faster
STAT = Path("/proc/stat")
BUSY = 0, 1, 2, 5, 6  # columns there: user, nice, system, interrupts of two kinds
STOLEN = 7


class Look(NamedTuple):
    """Seconds so far: of the clock, of our own on all cores, and of others', including ours."""

    clock: float
    own: float
    all: float


def core_times(stat: Path = STAT) -> tuple[float, float] | None:
    """Seconds that the cores that we may use have computed so far, for anybody, and that the host of a
    virtual machine took from them; None where the system does not say."""
    try:
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = stat.read_text().splitlines()
        cells = [line.split()[1:] for line in lines if line.split(maxsplit=1)[0] in allowed]
        busy = sum(int(row[column]) for row in cells for column in BUSY)
        stolen = sum(int(row[STOLEN]) for row in cells)
    except (OSError, AttributeError, ValueError, IndexError):
        return None
    if not cells:
        return None
    tick = os.sysconf("SC_CLK_TCK")
    return busy / tick, stolen / tick


def look(stat: Path = STAT) -> Look | None:
    """What the cores that we may use have done so far; None where the system does not say."""
    found = core_times(stat)
    return None if found is None else Look(time.perf_counter(), time.process_time(), found[0])


class Threads:
    """As many as `most`, and fewer where others are busy. Others that run only where nothing else does, since
    they are niced, look the same beside fewer threads as those that would not make room; so all threads are
    tried again from time to time, ever more rarely as long as that was for nothing."""

    def __init__(
        self,
        most: int,
        looks: Callable[[], Look | None] = look,
        cores: int | None = None,
        alone: bool = False,
    ) -> None:
        """`cores`: those that this process may use. `alone`: steps of few tokens compute in kernels but for
        trifles, which torch does on one thread: waking others for them costs more than it brings, and so
        their bits do not depend on who else is busy."""
        self.most, self._looks, self._alone = most, looks, alone
        self._cores = cores or affinity()
        self.count, self._last = most, looks()
        self._patience, self._since = SOON, 0.0
        self.steps = self.sum = 0  # steps, and threads over all of them

    def now(self) -> int:
        """For a step that begins."""
        last = self._last
        if last is not None and time.perf_counter() - last.clock >= PERIOD:
            self._last = found = self._looks()
            if found is not None:
                self._settle(self._free(last, found), found.clock)
        self.steps, self.sum = self.steps + 1, self.sum + self.count
        return self.count

    @contextmanager
    def narrow(self, is_narrow: bool) -> Iterator[None]:
        """While a step of few tokens is computed."""
        if not (self._alone and is_narrow):
            yield
            return
        before = torch.get_num_threads()
        use_here(1)
        try:
            yield
        finally:
            use_here(before)

    def _free(self, last: Look, found: Look) -> int:
        seconds = max(1e-9, found.clock - last.clock)
        others = max(0.0, (found.all - last.all - found.own + last.own) / seconds)
        return max(1, min(self.most, int(self._cores - others + SPARE)))

    def _settle(self, free: int, clock: float) -> None:
        if free == self.most:
            self._patience = SOON
        elif self.count == self.most:
            self._since = clock
        elif clock - self._since > self._patience:
            self._patience = min(2 * self._patience, LATE)
            free = self.most
        self.count = free


def use_here(count: int) -> None:
    """Threads of products that torch computes for this thread. `torch.set_num_threads` would also tell those
    that come to torch for the first time meanwhile, which keep what they are told then."""
    setters = _setters()
    for setter in setters:
        setter(count)
    if not setters:
        torch.set_num_threads(count)


@cache
def _setters() -> tuple[Callable[[int], object], ...]:
    """Of torch's OpenMP and, where it has one, its MKL; none where they are not found."""
    before, openmp = torch.get_num_threads(), mapped("libgomp")
    if openmp is None:
        return ()
    found: list[Callable[[int], object]] = [ctypes.CDLL(openmp).omp_set_num_threads]
    found[0](before + 1)
    is_torchs = torch.get_num_threads() == before + 1
    found[0](before)
    if not is_torchs:  # another library brought one, too
        return ()
    if (cpu := mapped("libtorch_cpu")) is not None:
        with suppress(AttributeError):
            found.append(ctypes.CDLL(cpu).MKL_Set_Num_Threads_Local)
    return tuple(found)


def affinity() -> int:
    """Processors that this process may use, by its mask."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
