"""A thread pool that reads records. A record is cut into pieces, so that one read uses all threads; what is
waited for goes before what is read ahead. Reading holds no core: the threads sleep in the kernel.

A record of a small model is read in half a millisecond, so that handing it over must cost little: where
there is a compiled backend, threads of its read (kernels/csrc/reads.c), which never wait for Python;
here is the plain twin, with queues and flags whose single operations are atomic, and no locks around
them. What fails in C is read again here, with retries and a typed error.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue

from outsize.kernels.backend import Backend
from outsize.kernels.plain import PLAIN
from outsize.storage.native_reader import NativeReader
from outsize.storage.table import Table
from outsize.storage.tickets import (
    NativeTicket,
    PlainTicket,
    Request,
    ScatteredTicket,
    Ticket,
)

THREADS = 4


class _Queues:
    """The work of the threads of Python."""

    def __init__(self) -> None:
        self.urgent: deque[PlainTicket] = deque()  # once for each piece
        self.ahead: deque[PlainTicket] = deque()
        self.work: SimpleQueue[bool] = SimpleQueue()  # True for each of them; False: end

    def put(self, ticket: PlainTicket, urgent: bool) -> None:
        (self.urgent if urgent else self.ahead).append(ticket)
        self.work.put(True)

    def next(self) -> PlainTicket:
        """The first ticket in line. There is one for each True, but another thread may take it meanwhile."""
        while True:
            for queue in (self.urgent, self.ahead):
                if queue:
                    try:
                        return queue.popleft()
                    except IndexError:
                        pass

    def serve(self) -> None:
        """Read until there is a False: what a thread runs."""
        while self.work.get():
            ticket = self.next()
            if (start := ticket.take()) is not None:
                ticket.run(start)


class Reader:
    """Reading threads: in C where the backend is compiled, else, or for unusual files, in Python. The
    `backend` also runs the matrices that are read. Close it."""

    def __init__(self, threads: int = THREADS, backend: Backend = PLAIN) -> None:
        self.backend = backend
        self._queues = _Queues()
        self._count, self._threads = threads, list[threading.Thread]()
        library = backend.library
        self._native = None if library is None else NativeReader(library, threads)

    def submit(
        self, table: Table, index: int, out: memoryview, start: int = 0, urgent: bool = True
    ) -> Ticket:
        """Start reading a record, or from byte `start` on as much as `out` holds, which must stay until the
        ticket is done. `urgent`: it is waited for."""
        request = Request(table, index, out, start, urgent)
        handle = None if self._native is None else table.handle()
        if self._native is not None and handle is not None:
            return NativeTicket(self._native, handle, request)
        ticket = PlainTicket(self.queue, request)
        self.queue(ticket, urgent)
        return ticket

    def submit_run(self, table: Table, first: int, out: memoryview, urgent: bool) -> Ticket | None:
        """Start reading records that follow each other, as many as `out` holds, at once; they have been
        checked before. None where they have not, or where there are no threads of C."""
        handle = None if self._native is None else table.handle()
        records = range(first, first + len(out) // table.header.stride)
        if self._native is None or handle is None or not all(map(table.is_verified, records)):
            return None
        return NativeTicket(self._native, handle, Request(table, first, out, 0, urgent))

    def submit_scattered(
        self, table: Table, first: int, outs: Sequence[memoryview], urgent: bool
    ) -> Ticket | None:
        """Start reading whole records that follow each other, at once, into a buffer each. None where there
        are no threads of C: then they are read one by one."""
        handle = None if self._native is None else table.handle()
        if self._native is None or handle is None:
            return None
        requests = [Request(table, first + i, out, 0, urgent) for i, out in enumerate(outs)]
        return ScatteredTicket(self._native, handle, requests)

    def queue(self, ticket: PlainTicket, urgent: bool) -> None:
        """Put a ticket in line, once for each of its pieces."""
        if not self._threads:
            self._start()
        for _ in range(len(ticket.pieces)):
            self._queues.put(ticket, urgent)

    def _start(self) -> None:
        names = (f"outsize-reader-{i}" for i in range(self._count))
        serve = self._queues.serve
        self._threads = [threading.Thread(target=serve, name=n, daemon=True) for n in names]
        for thread in self._threads:
            thread.start()

    def restart(self) -> None:
        """End all reads and drop the queues: after a call that an exception broke off, wherever that was."""
        self._end_threads()
        self._queues = _Queues()
        if self._native is not None:
            self._native.drain()

    def _end_threads(self) -> None:
        for _ in self._threads:
            self._queues.work.put(False)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._threads = []

    def close(self) -> None:
        """Finish what is under way, and end the threads."""
        self._end_threads()
        if self._native is not None:
            native, self._native = self._native, None
            native.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
