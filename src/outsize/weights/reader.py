"""A few threads that read records. A record is cut into pieces, so that one read uses all of them;
what is waited for goes before what is read ahead. Reading holds no core: the threads sleep in the kernel.
"""

from __future__ import annotations

import threading
from collections import deque

from outsize.weights.table import Table

THREADS = 4
PIECE = 1 << 20


class Ticket:
    """A record, or from byte `start` on a part of it, on its way into a buffer."""

    __slots__ = ("_done", "_left", "error", "index", "out", "pieces", "start", "table")

    def __init__(self, table: Table, index: int, out: memoryview, start: int = 0) -> None:
        self.table, self.index, self.out, self.start = table, index, out, start
        self.pieces = deque(range(0, len(out), PIECE))
        self._left, self._done = len(self.pieces), threading.Event()
        self.error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        """Until the record is there and checked. Raises PackError, ReadError."""
        self._done.wait()
        if self.error is not None:
            raise self.error

    def wait_quietly(self) -> None:
        """Until it is there or has failed."""
        self._done.wait()

    def run(self, at: int, lock: threading.Condition) -> None:
        """Read one piece; whoever reads the last one checks the record."""
        try:
            if self.error is None:
                piece = self.out[at : at + PIECE]
                self.table.read_part(self.index, piece, self.start + at)
        except BaseException as e:
            self.error = e
        with lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish()

    def _finish(self) -> None:
        try:
            if self.error is None and len(self.out) == self.table.header.stride:
                self.table.check(self.index, self.out)
        except BaseException as e:
            self.error = e
        self._done.set()


class Reader:
    """The threads; close it."""

    def __init__(self, threads: int = THREADS) -> None:
        self._lock = threading.Condition()
        self._urgent: deque[Ticket] = deque()
        self._ahead: deque[Ticket] = deque()
        self._closed = False
        names = (f"outsize-reader-{i}" for i in range(threads))
        self._threads = [threading.Thread(target=self._run, name=n, daemon=True) for n in names]
        for thread in self._threads:
            thread.start()

    def submit(
        self, table: Table, index: int, out: memoryview, start: int = 0, urgent: bool = True
    ) -> Ticket:
        """Start reading; `out` must stay until the ticket is done. Whole records are checked."""
        ticket = Ticket(table, index, out, start)
        with self._lock:
            (self._urgent if urgent else self._ahead).append(ticket)
            self._lock.notify(len(ticket.pieces))
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """What was read ahead is now waited for."""
        with self._lock:
            if ticket in self._ahead:
                self._ahead.remove(ticket)
                self._urgent.append(ticket)

    def _next(self) -> tuple[Ticket, int] | None:
        """The next piece to read; None once closed and empty."""
        with self._lock:
            while True:
                queue = self._urgent or self._ahead
                if queue:
                    ticket = queue[0]
                    start = ticket.pieces.popleft()
                    if not ticket.pieces:
                        queue.popleft()
                    return ticket, start
                if self._closed:
                    return None
                self._lock.wait()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            work[0].run(work[1], self._lock)

    def close(self) -> None:
        """Finish what is under way, and end the threads."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
