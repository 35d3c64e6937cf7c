"""Threads that exchange messages while the caller computes on: order is kept."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from outsize.parallel.collective import Pending, Ready
from outsize.parallel.transport import LOOK_S

LONG = 64 << 10  # bytes a message: below, handing over to a thread takes longer than what it hides
_Job = tuple[Callable[[], Tensor], "Future[Tensor]"] | None


class Line:
    """One thread, from the first job on, that runs jobs one after another."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] | None = None

    def run(self, job: Callable[[], Tensor]) -> Future[Tensor]:
        """The result, or the error, is the future's."""
        if self._jobs is None:
            self._jobs = SimpleQueue()
            weakref.finalize(self, self._jobs.put, None)
            threading.Thread(target=_serve, args=(self._jobs,), name="outsize-exchange").start()
        future: Future[Tensor] = Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """No job comes any more."""
        if self._jobs is not None:
            self._jobs.put(None)


class _Later:
    def __init__(self, future: Future[Tensor]) -> None:
        self._future = future

    def wait(self) -> Tensor:
        return self._future.result()


class Lane:
    """Runs exchanges one after another: short ones in the caller's thread, unless long ones wait before
    them. All ranks see the same sizes, and so the same order on every connection."""

    def __init__(self) -> None:
        self._line = Line()
        self._last: Future[Tensor] | None = None

    def run(self, size: int, exchange: Callable[[], Tensor]) -> Pending:
        """`size`: bytes of the message. An error of the exchange is raised here or by `wait`."""
        if size < LONG and (self._last is None or self._last.done()):
            return Ready(exchange())
        self._last = self._line.run(exchange)
        return _Later(self._last)


@torch.inference_mode()
def _serve(jobs: SimpleQueue[_Job]) -> None:
    """Until no more come, or the process ends: killed as a daemon within C++ a thread would abort it."""
    while threading.main_thread().is_alive():
        try:
            if (job := jobs.get(timeout=LOOK_S)) is None:
                return
        except Empty:
            continue
        run, future = job
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)
        del run, future, job
