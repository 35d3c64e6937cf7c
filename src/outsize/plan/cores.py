"""Whether other programs use the processor while something is measured: figures are too low then."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import psutil

from outsize.kernels.threads import STAT, core_times

AVERAGE = Path("/proc/loadavg")
OTHERS, STOLEN = 0.25, 0.1  # cores' worth that others may take, and that a host may take away
APART = 1.5  # times the best of several repeats, that their median may take


class Times(NamedTuple):
    """Seconds of processor time so far: of all processes on our cores, stolen by the host of a virtual
    machine, and of this process."""

    all: float
    stolen: float
    own: float


def times() -> Times:
    """The times now; where the system does not tell, as if this process were alone."""
    mine = psutil.Process().cpu_times()
    own = mine.user + mine.system + mine.children_user + mine.children_system
    busy, stolen = core_times(STAT) or (own, 0.0)
    return Times(busy, stolen, own)


def running() -> int:
    """Runnable threads of the whole machine, without the one that asks; 0 where the system does not tell."""
    try:
        return max(0, int(AVERAGE.read_text().split()[3].partition("/")[0]) - 1)
    except (OSError, ValueError, IndexError):
        return 0


class Watch:
    """Watches during a `with` block how many cores others took; `reason` says it afterwards."""

    def __init__(self) -> None:
        self.others = self.stolen = 0.0  # in cores
        self._queue = self._disagree = 0.0

    def __enter__(self) -> Watch:
        self._queue = running()
        self._started, self._before = time.monotonic(), times()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        took, now, then = time.monotonic() - self._started, times(), self._before
        if took > 0:
            self.others = max(0.0, now.all - then.all - (now.own - then.own)) / took
            self.stolen = max(0.0, now.stolen - then.stolen) / took

    def compare(self, best: float, median: float) -> None:
        """Note how far repeats of the same work lie apart, in seconds."""
        self._disagree = max(self._disagree, median / best)

    @property
    def reason(self) -> str:
        """Why what was measured may be too low; empty on a quiet machine."""
        said = []
        if self.others > OTHERS:
            said.append(f"other processes took {self.others:.1f} cores")
        if self.stolen > STOLEN:
            said.append(f"the host took {self.stolen:.1f} cores away")
        if self._queue >= (os.cpu_count() or 1):
            said.append(f"{self._queue:.0f} threads were waiting to run")
        if self._disagree > APART:
            said.append(f"repeats of the same work differ {self._disagree:.1f} times")
        return ", ".join(said)
