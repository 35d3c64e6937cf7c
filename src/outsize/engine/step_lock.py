"""Many callers of one model: each has the weights to itself for a step, in any number of threads.

What outlives a step (keys and values, drawn numbers, drafts) belongs to a reply; what replies share is
changed within steps alone. So replies may be interleaved as callers like, in one thread or in several.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from outsize.engine import shutdown
from outsize.errors import BusyError, ClosedError, ForkError, OutsizeError

HAND_OVER_S = 2e-4  # a lock is not fair: who had a step lets those who wait wake up
T = TypeVar("T")


_opened = set[int]()  # processes, this one or its parents, in which a model was opened


def check_fork(name: str) -> None:
    """Raises ForkError where a model was opened before this process was forked: the threads that compute are
    the process's, and a fork has none of them."""
    if _opened and os.getpid() not in _opened:
        raise ForkError(
            f"{name} cannot be used here: process {os.getpid()} is a fork of one that had opened a model, "
            "without the threads of that; open models "
            "after the fork, or start processes by spawn or forkserver"
        )


def _nothing() -> None:
    """Of a closed model, there is nothing to put right."""


class StepLock:
    """One caller's step after another's. After a step that an exception broke off (an interrupt, a failed
    read or allocation, at any line), `restore` is called before the next one."""

    def __init__(self, name: str, restore: Callable[[], None]) -> None:
        self._name, self._mend = name, restore
        self._lock, self._owner = threading.Lock(), 0
        self._waiting: set[int] = set()  # threads
        self._is_whole, self._is_closed = True, False
        _opened.add(os.getpid())

    def check(self) -> None:
        """Raises ForkError, ClosedError."""
        check_fork(self._name)
        if self._is_closed:
            raise ClosedError(f"the model {self._name} is closed; load it again")

    def take(self, step: Callable[[], T]) -> T:
        """Do something alone with the weights. Raises BusyError, ClosedError, ForkError."""
        self.check()
        return self._alone(step, True)

    def close(self, end: Callable[[], None]) -> None:
        """Take the last turn. Whoever comes later gets a ClosedError; in a fork, there is
        nothing to end."""
        self._is_closed = True
        if os.getpid() in _opened:
            self._alone(end, False)
        self._mend = _nothing  # what it would put right is not kept

    def _alone(self, step: Callable[[], T], is_open: bool) -> T:
        me = threading.get_ident()
        if self._lock.locked() and self._owner == me:
            raise BusyError(
                f"the model {self._name} is in the middle of a step; ask it when that has ended, not "
                "from a recorder or a signal's handler"
            )
        self._waiting.add(me)
        try:
            with shutdown.work():
                return self._locked(step, is_open)
        finally:
            self._waiting.discard(me)
            if self._waiting:
                time.sleep(HAND_OVER_S)

    def _locked(self, step: Callable[[], T], is_open: bool) -> T:
        with self._lock:
            return self._owned(step, is_open)

    def _owned(self, step: Callable[[], T], is_open: bool) -> T:
        """With the lock held."""
        me = threading.get_ident()
        self._waiting.discard(me)
        self._owner = me
        try:
            return self._whole(step) if is_open else step()
        finally:
            self._owner = 0

    def _whole(self, step: Callable[[], T]) -> T:
        """A step of an open model, after which the weights' bookkeeping is as it must be; or it is known that
        it may not be."""
        self.check()  # closed while we waited
        if not self._is_whole:
            self._restore()
        self._is_whole = False
        made = step()
        self._is_whole = True
        return made

    def _restore(self) -> None:
        try:
            self._mend()
        except OutsizeError:
            raise
        except Exception as e:
            raise ClosedError(
                f"the model {self._name} was broken off in the middle of a step and cannot be put right "
                f"({type(e).__name__}: {e}); close it, and load it again"
            ) from e
