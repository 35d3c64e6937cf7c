"""A record on its way into a buffer: read by threads of Python, or by those of kernels/csrc/reads.c."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Protocol

from outsize.storage.native_reader import FAILED, Job, Reads
from outsize.storage.table import Table

PIECE = 1 << 20


class Ticket(Protocol):
    """A record, or from byte `start` on a part of it, on its way into a buffer."""

    @property
    def is_done(self) -> bool: ...
    @property
    def error(self) -> BaseException | None:
        """Why it failed, once it is done."""
        ...

    def wait(self) -> None:
        """Until the record is there and checked. Raises PackError, ReadError."""
        ...

    def wait_quietly(self) -> None:
        """Until it is there or has failed."""
        ...

    def cancel(self) -> bool:
        """Give up what nobody has begun; False if it is too late for that."""
        ...

    def promote(self) -> None:
        """What was read ahead is now waited for."""
        ...


class PlainTicket:
    """Read by the threads of reader.py."""

    __slots__ = (
        "_count", "_done", "_ends", "_queue", "error", "index", "out", "pieces", "start", "table",
    )  # fmt: skip

    def __init__(
        self,
        queue: Callable[[PlainTicket, bool], None],
        table: Table,
        index: int,
        out: memoryview,
        start: int,
    ) -> None:
        self._queue, self.table, self.index, self.out, self.start = queue, table, index, out, start
        self.pieces = deque(range(0, len(out), PIECE))
        self._count = len(self.pieces)
        self._ends = deque([True] + [False] * (len(self.pieces) - 1))  # who pops True ends last
        self._done = threading.Lock()  # free once the record is there
        self._done.acquire()
        self.error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return not self._done.locked()

    def wait(self) -> None:
        self.wait_quietly()
        if self.error is not None:
            raise self.error

    def wait_quietly(self) -> None:
        with self._done:
            pass

    def promote(self) -> None:
        """Pieces that nobody has begun are queued once more."""
        self._queue(self, True)

    def take(self) -> int | None:
        """A piece that nobody has begun."""
        try:
            return self.pieces.popleft()
        except IndexError:
            return None

    def cancel(self) -> bool:
        mine = list(iter(self.take, None))
        if len(mine) < self._count:
            for at in mine:
                self.run(at)
            return False
        self.error = CancelledError()
        self._done.release()
        return True

    def run(self, at: int) -> None:
        """Read one piece; whoever ends last checks the record."""
        try:
            if self.error is None:
                piece = self.out[at : at + PIECE]
                self.table.read_part(self.index, piece, self.start + at)
        except BaseException as e:
            self.error = e
        if self._ends.pop():
            self._finish()

    def _finish(self) -> None:
        try:
            if self.error is None and len(self.out) == self.table.header.stride:
                self.table.check(self.index, self.out)
        except BaseException as e:
            self.error = e
        self._done.release()


class NativeTicket:
    """Read by threads of kernels/csrc/reads.c."""

    __slots__ = ("_error", "_job", "_reads", "_tried", "index", "out", "start", "table")

    def __init__(
        self,
        reads: Reads,
        handle: int,
        table: Table,
        index: int,
        out: memoryview,
        start: int,
        urgent: bool,
    ) -> None:
        self._reads, self.table, self.index, self.out, self.start = reads, table, index, out, start
        self._error: BaseException | None = None
        self._tried = False
        kept = ctypes.c_char.from_buffer(out)  # the buffer stays as long as this
        size, stride = len(out), table.header.stride
        check = size == stride and not table.is_verified(index)
        self._job = Job(
            out=ctypes.addressof(kept), size=size, offset=index * stride + start, piece=PIECE,
            left=-(-size // PIECE), fd=handle, check=check, crc=table.header.checksums[index],
            urgent=urgent,
        )  # fmt: skip
        table.traffic.count(size)
        reads.submit(self._job, kept)

    @property
    def is_done(self) -> bool:
        return bool(self._job.state)

    @property
    def error(self) -> BaseException | None:
        if self._job.state == FAILED and not self._tried:
            self._tried = True
            self._again()
        return self._error

    def wait(self) -> None:
        self._reads.wait(self._job)
        if self.error is not None:
            raise self.error
        if self._job.check:
            self.table.passed(self.index)

    def wait_quietly(self) -> None:
        self._reads.wait(self._job)

    def promote(self) -> None:
        self._reads.promote(self._job)

    def cancel(self) -> bool:
        if not self._reads.cancel(self._job):
            return False
        self._error = CancelledError()
        self.table.traffic.count(-len(self.out))
        return True

    def _again(self) -> None:
        """With retries, and words for what is wrong."""
        self.table.traffic.count(-len(self.out))
        try:
            self.table.read_part(self.index, self.out, self.start)
            if self._job.check:
                self.table.check(self.index, self.out)
        except BaseException as e:
            self._error = e
