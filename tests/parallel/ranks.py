"""Runs a function on every rank of a process, a thread each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from outsize.parallel.transport import Transport

T = TypeVar("T")


def on_all(transports: Sequence[Transport], run: Callable[[Transport], T]) -> list[T]:
    """What each rank returned, by rank; a rank that raises leaves, and its error is raised here."""

    def one(transport: Transport) -> T:
        try:
            return run(transport)
        except BaseException:
            transport.close()
            raise

    with ThreadPoolExecutor(len(transports)) as pool:
        return [f.result() for f in [pool.submit(one, t) for t in transports]]
