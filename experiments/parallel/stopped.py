"""A process that another stops again and again, as a machine of about half the speed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from outsize.parallel.des import Stops

DUTY_S, GAP_S, LONG_S = 0.001, 3e-4, 0.5


@contextmanager
def halved(pid: int) -> Iterator[None]:
    """It goes for DUTY_S and stands for DUTY_S, in turn, as far as what stops it is on time."""
    if not (slower := os.fork()):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(0, os.sched_getaffinity(pid))
            while True:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(DUTY_S)
                os.kill(pid, signal.SIGCONT)
                time.sleep(DUTY_S)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(slower, signal.SIGKILL)
        os.waitpid(slower, 0)
        os.kill(pid, signal.SIGCONT)


def seen() -> Stops:
    """How long this process goes and stands, as it sees it: jumps of the clock in a loop that only looks."""
    begun = last = time.monotonic()
    standing, count = 0.0, 0
    while last - begun < LONG_S:
        now = time.monotonic()
        if now - last > GAP_S:
            standing, count = standing + now - last, count + 1
        last = now
    return Stops((last - begun - standing) / max(1, count), standing / max(1, count))
