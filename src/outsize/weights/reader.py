"""A few threads that read records. A record is cut into pieces, so that one read uses all of them;
what is waited for goes before what is read ahead. Reading holds no core: the threads sleep in the kernel.

A record of a small model is read in half a millisecond, so that handing it over must cost little: where
there are compiled kernels, threads of theirs read (native/reads.c), which never wait for Python; here is
the plain twin, with queues and flags whose single operations are atomic, and no locks around them. What
fails in C is read again here, with retries and a typed error.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from concurrent.futures import CancelledError
from queue import SimpleQueue
from typing import Protocol

from outsize.native.kernels import Kernels
from outsize.native.reads import FAILED, Job, Reads
from outsize.weights.table import Table

THREADS = 4
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
    """Read by the threads below."""

    __slots__ = (
        "_count",
        "_done",
        "_ends",
        "_reader",
        "error",
        "index",
        "out",
        "pieces",
        "start",
        "table",
    )

    def __init__(
        self, reader: Reader, table: Table, index: int, out: memoryview, start: int
    ) -> None:
        self._reader, self.table, self.index, self.out, self.start = (
            reader,
            table,
            index,
            out,
            start,
        )
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
        self._reader.queue(self, True)

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
    """Read by threads of native/reads.c."""

    __slots__ = ("_error", "_job", "_kept", "_reads", "_tried", "index", "out", "start", "table")

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
        self._kept = ctypes.c_char.from_buffer(out)  # the buffer stays as long as this
        size, stride = len(out), table.header.stride
        check = size == stride and not table.is_verified(index)
        self._job = Job(
            out=ctypes.addressof(self._kept), size=size, offset=index * stride + start, piece=PIECE,
            left=-(-size // PIECE), fd=handle, check=check, crc=table.header.checksums[index],
            urgent=urgent,
        )  # fmt: skip
        table.traffic.count(size)
        reads.submit(self._job)

    def __del__(self) -> None:
        self._reads.wait(self._job)

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


class Reader:
    """The threads, of C where there are kernels, and else or for unusual media of Python; close it."""

    def __init__(self, threads: int = THREADS, kernels: Kernels | None = None) -> None:
        self._urgent: deque[PlainTicket] = deque()  # once for each piece
        self._ahead: deque[PlainTicket] = deque()
        self._work: SimpleQueue[bool] = SimpleQueue()  # True for each of them; False: go home
        self._count, self._threads = threads, list[threading.Thread]()
        self._reads = None if kernels is None else Reads(kernels.library, threads)

    def submit(
        self, table: Table, index: int, out: memoryview, start: int = 0, urgent: bool = True
    ) -> Ticket:
        """Start reading; `out` must stay until the ticket is done. Whole records are checked."""
        handle = None if self._reads is None else table.handle()
        if self._reads is not None and handle is not None:
            return NativeTicket(self._reads, handle, table, index, out, start, urgent)
        ticket = PlainTicket(self, table, index, out, start)
        self.queue(ticket, urgent)
        return ticket

    def queue(self, ticket: PlainTicket, urgent: bool) -> None:
        """Once for each of its pieces."""
        if not self._threads:
            self._start()
        queue = self._urgent if urgent else self._ahead
        for _ in range(len(ticket.pieces)):
            queue.append(ticket)
            self._work.put(True)

    def _start(self) -> None:
        names = (f"outsize-reader-{i}" for i in range(self._count))
        self._threads = [threading.Thread(target=self._run, name=n, daemon=True) for n in names]
        for thread in self._threads:
            thread.start()

    def _next(self) -> PlainTicket:
        """There is one for each True, but another thread may take it from under our eyes."""
        while True:
            for queue in (self._urgent, self._ahead):
                if queue:
                    try:
                        return queue.popleft()
                    except IndexError:
                        pass

    def _run(self) -> None:
        while self._work.get():
            ticket = self._next()
            if (start := ticket.take()) is not None:
                ticket.run(start)

    def close(self) -> None:
        """Finish what is under way, and end the threads."""
        for _ in self._threads:
            self._work.put(False)
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._reads is not None:
            self._reads.close()
            self._reads = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
