"""A pending read of one record (a future): by threads of Python, or by those of kernels/csrc/reads.c."""

from __future__ import annotations

import ctypes
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import NamedTuple

from outsize.storage.native_reader import FAILED, Job, NativeReader, Part
from outsize.storage.table import Table

PIECE = 1 << 20  # bytes that one thread reads at a time


class Request(NamedTuple):
    """Read a record of a table into `out`: from byte `start` on, as much as `out` holds; or several whole
    records that follow each other, which are not checked."""

    table: Table
    record: int
    out: memoryview
    start: int
    urgent: bool  # waited for, and so read before what is read ahead

    @property
    def is_whole(self) -> bool:
        """Whole records are checked."""
        return len(self.out) == self.table.header.stride

    def add_up(self, requests: int, sign: int = 1) -> None:
        """Add to the bytes read, by record, and so many requests to those."""
        size, stride = len(self.out), self.table.header.stride
        for record in range(self.record, self.record + max(1, size // stride)):
            self.table.count(record, sign * min(size, stride), sign * requests)
            requests = 0


class Ticket(ABC):
    """What a reader returns for a request: wait for it, or cancel it."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._error: BaseException | None = None

    @property
    def error(self) -> BaseException | None:
        """Why it failed, once it is done."""
        return self._error

    def wait(self) -> None:
        """Wait until the record is there and checked. Raises PackError, ReadError."""
        self.wait_quietly()
        if (error := self.error) is not None:
            raise error

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Is the record there, or has reading it failed?"""

    @abstractmethod
    def wait_quietly(self) -> None:
        """Wait until it is done."""

    @abstractmethod
    def cancel(self) -> bool:
        """Do not read what no thread has begun to read; False if it is too late for that."""

    @abstractmethod
    def promote(self) -> None:
        """What was read ahead is now waited for."""


class PlainTicket(Ticket):
    """Read by the threads of reader.py. Each takes pieces from a deque, whose operations are atomic."""

    def __init__(self, queue: Callable[[PlainTicket, bool], None], request: Request) -> None:
        super().__init__(request)
        self._queue = queue
        self.pieces = deque(range(0, len(request.out), PIECE))
        self._count = len(self.pieces)
        self._ends = deque([True] + [False] * (self._count - 1))  # who pops True ends last
        self._done = threading.Lock()  # free once the record is there
        self._done.acquire()

    @property
    def is_done(self) -> bool:
        return not self._done.locked()

    def wait_quietly(self) -> None:
        with self._done:
            pass

    def promote(self) -> None:
        """Pieces that nobody has begun are queued once more."""
        self._queue(self, True)

    def take(self) -> int | None:
        """The first byte of a piece that nobody has begun."""
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
        self._error = CancelledError()
        self._done.release()
        return True

    def run(self, at: int) -> None:
        """Read one piece; whoever ends last checks the record."""
        table, record, out, start, _ = self._request
        try:
            if self._error is None:
                table.read_part(record, out[at : at + PIECE], start + at)
        except BaseException as e:
            self._error = e
        if self._ends.pop():
            self._finish()

    def _finish(self) -> None:
        try:
            if self._error is None and self._request.is_whole:
                self._request.table.check(self._request.record, self._request.out)
        except BaseException as e:
            self._error = e
        self._done.release()


class NativeTicket(Ticket):
    """Read by threads of kernels/csrc/reads.c; what fails there is read again here, with retries."""

    def __init__(self, reader: NativeReader, handle: int, request: Request) -> None:
        table, record, out, start, urgent = request
        super().__init__(request)
        self._reader, self._is_retried = reader, False
        kept = ctypes.c_char.from_buffer(out)  # the buffer stays as long as this
        size, header = len(out), table.header
        piece = PIECE if size <= header.stride else header.stride
        check = size == header.stride and not table.is_verified(record)
        self._job = Job(
            out=ctypes.addressof(kept), size=size, offset=record * header.stride + start, piece=piece,
            left=-(-size // piece), fd=handle, check=check, crc=header.checksums[record],
            urgent=urgent,
        )  # fmt: skip
        request.add_up(self._job.left)
        reader.submit(self._job, kept)

    @property
    def is_done(self) -> bool:
        return bool(self._job.state)

    @property
    def error(self) -> BaseException | None:
        if self._job.state == FAILED and not self._is_retried:
            self._is_retried = True
            self._retry()
        return self._error

    def wait_quietly(self) -> None:
        self._reader.wait(self._job)

    def wait(self) -> None:
        super().wait()
        if self._job.check:
            self._request.table.passed(self._request.record)

    def promote(self) -> None:
        self._reader.promote(self._job)

    def cancel(self) -> bool:
        """A run of records is read for all of them: nobody stops it."""
        is_run = self._job.size > self._request.table.header.stride
        if is_run or not self._reader.cancel(self._job):
            return False
        self._error = CancelledError()
        self._request.add_up(self._job.left, -1)
        return True

    def _retry(self) -> None:
        table, record, out, start, _ = self._request
        stride = table.header.stride
        self._request.add_up(-(-len(out) // self._job.piece), -1)
        try:
            for at in range(0, len(out), stride):
                table.read_part(record + at // stride, out[at : at + stride], start)
            if self._job.check:
                table.check(record, out)
        except BaseException as e:
            self._error = e


class ScatteredTicket(NativeTicket):
    """Records that follow each other in the file, read by one request into buffers that need not. Whoever
    waits for one of them waits for all."""

    def __init__(self, reader: NativeReader, handle: int, requests: Sequence[Request]) -> None:
        Ticket.__init__(self, requests[0])
        self._reader, self._requests, self._is_retried = reader, requests, False
        table, first, _, _, urgent = requests[0]
        stride, sums = table.header.stride, table.header.checksums
        kept = [ctypes.c_char.from_buffer(r.out) for r in requests]
        self._unseen = [r.record for r in requests if not table.is_verified(r.record)]
        parts = (Part * len(kept))(*[
            Part(ctypes.addressof(k), sums[r.record], r.record in self._unseen)
            for k, r in zip(kept, requests, strict=True)
        ])  # fmt: skip
        size = stride * len(kept)
        self._job = Job(
            size=size, offset=first * stride, piece=size, left=1, fd=handle,
            parts=ctypes.addressof(parts), each=stride, check=bool(self._unseen), urgent=urgent,
        )  # fmt: skip
        self._add_up(1)
        reader.submit(self._job, (parts, kept))

    def wait(self) -> None:
        Ticket.wait(self)
        for record in self._unseen:
            self._request.table.passed(record)
        self._unseen = []

    def cancel(self) -> bool:
        """It is read for all of them: nobody stops it."""
        return False

    def _add_up(self, sign: int) -> None:
        for i, request in enumerate(self._requests):
            request.add_up(not i, sign)

    def _retry(self) -> None:
        self._add_up(-1)
        try:
            for table, record, out, _, _ in self._requests:
                table.read(record, out)
        except BaseException as e:
            self._error = e
