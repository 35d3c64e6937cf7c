"""One thread that exchanges long messages while the caller computes on: order is kept."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from outsize.parallel.collective import Pending, Ready

LONG = 64 << 10  # bytes a message: below, handing over to a thread takes longer than what it hides


class _Later:
    def __init__(self, future: Future[Tensor]) -> None:
        self._future = future

    def wait(self) -> Tensor:
        return self._future.result()


class Lane:
    """Runs exchanges one after another: short ones in the caller's thread, unless long ones wait before
    them. All ranks see the same sizes, and so the same order on every connection."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[Tensor] | None = None

    def run(self, size: int, exchange: Callable[[], Tensor]) -> Pending:
        """`size`: bytes of the message. An error of the exchange is raised here or by `wait`."""
        if size < LONG and (self._last is None or self._last.done()):
            return Ready(exchange())
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "outsize-exchange")
        self._last = self._thread.submit(torch.inference_mode()(exchange))
        return _Later(self._last)
