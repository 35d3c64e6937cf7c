"""The end of the interpreter, while daemon threads compute. A thread that Python ends in the middle of C++
takes the process down ("terminate called without an active exception"). So the end waits for the steps that
are under way, and threads that would begin another wait for the end."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 10  # that the end waits


class Shutdown:
    """Who computes, and whether the interpreter ends."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._busy: set[int] = set()  # threads
        self._is_ending = False

    @contextmanager
    def work(self) -> Iterator[None]:
        """Something that is over soon: a step, a template. What is inside another one is part of it."""
        me = threading.get_ident()
        if me in self._busy:
            yield
            return
        try:
            with self._lock:
                while self._is_ending and threading.current_thread() is not threading.main_thread():
                    self._lock.wait()
                self._busy.add(me)
            yield
        finally:
            with self._lock:
                self._busy.discard(me)
                self._lock.notify_all()

    def end(self) -> None:
        """Wait until nothing is under way."""
        with self._lock:
            self._is_ending = True
            self._lock.wait_for(lambda: not self._busy, PATIENCE_S)


def _after_fork() -> None:
    """Threads of the parent are not here."""
    global _shutdown
    _shutdown = Shutdown()


@contextmanager
def work() -> Iterator[None]:
    """As `Shutdown.work`, for this process."""
    with _shutdown.work():
        yield


_shutdown = Shutdown()
atexit.register(lambda: _shutdown.end())
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
