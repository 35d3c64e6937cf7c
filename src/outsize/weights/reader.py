"""A few threads that read records. A record is cut into pieces, so that one read uses all of them;
what is waited for goes before what is read ahead. Reading holds no core: the threads sleep in the kernel.

A record of a small model is read in half a millisecond, so that handing it over must cost little: queues
and flags whose single operations are atomic, and no locks around them.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import CancelledError
from queue import SimpleQueue

from outsize.weights.table import Table

THREADS = 4
PIECE = 1 << 20


class Ticket:
    """A record, or from byte `start` on a part of it, on its way into a buffer."""

    __slots__ = ("_count", "_done", "_ends", "error", "index", "out", "pieces", "start", "table")

    def __init__(self, table: Table, index: int, out: memoryview, start: int = 0) -> None:
        self.table, self.index, self.out, self.start = table, index, out, start
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
        """Until the record is there and checked. Raises PackError, ReadError."""
        self.wait_quietly()
        if self.error is not None:
            raise self.error

    def wait_quietly(self) -> None:
        """Until it is there or has failed."""
        with self._done:
            pass

    def take(self) -> int | None:
        """A piece that nobody has begun."""
        try:
            return self.pieces.popleft()
        except IndexError:
            return None

    def cancel(self) -> bool:
        """Give up what nobody has begun; False if it is too late for that."""
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


class Reader:
    """The threads; close it."""

    def __init__(self, threads: int = THREADS) -> None:
        self._urgent: deque[Ticket] = deque()  # once for each piece
        self._ahead: deque[Ticket] = deque()
        self._work: SimpleQueue[bool] = SimpleQueue()  # True for each of them; False: go home
        names = (f"outsize-reader-{i}" for i in range(threads))
        self._threads = [threading.Thread(target=self._run, name=n, daemon=True) for n in names]
        for thread in self._threads:
            thread.start()

    def submit(
        self, table: Table, index: int, out: memoryview, start: int = 0, urgent: bool = True
    ) -> Ticket:
        """Start reading; `out` must stay until the ticket is done. Whole records are checked."""
        ticket = Ticket(table, index, out, start)
        self._queue(ticket, self._urgent if urgent else self._ahead)
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """What was read ahead is now waited for: pieces that nobody has begun are queued once more."""
        self._queue(ticket, self._urgent)

    def _queue(self, ticket: Ticket, queue: deque[Ticket]) -> None:
        for _ in range(len(ticket.pieces)):
            queue.append(ticket)
            self._work.put(True)

    def _next(self) -> Ticket:
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

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
