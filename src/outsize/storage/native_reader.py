"""Bindings of kernels/csrc/reads.c: threads in C that read records, without Python's lock."""

from __future__ import annotations

import ctypes

_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
WAITING, GOOD, FAILED, CANCELLED = range(4)


class Part(ctypes.Structure):
    """C's `Part`: one of several records that follow each other in a file, and where it goes."""

    _fields_ = (("out", _P), ("crc", ctypes.c_uint32), ("check", _I))


class Job(ctypes.Structure):
    """C's `Job`: a record, or a part of it, to be read. Must outlive its reading."""

    _fields_ = (
        ("after", _P), ("out", _P), ("size", _L), ("offset", _L), ("piece", _L), ("taken", _L), ("left", _L),
        ("parts", _P), ("each", _L),
        ("fd", _I), ("check", _I), ("crc", ctypes.c_uint32), ("bad", _I), ("urgent", _I), ("state", _I),
    )  # fmt: skip


class NativeReader:
    """A pool of reading threads in C; close it."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._open, self._close = library.reads_open, library.reads_close
        self._submit, self._promote = library.reads_submit, library.reads_promote
        self._cancel, self._wait = library.reads_cancel, library.reads_wait
        self._open.argtypes, self._open.restype = [_I], _P
        self._close.argtypes, self._close.restype = [_P], None
        for function in (self._submit, self._promote, self._wait):
            function.argtypes, function.restype = [_P, _P], None
        self._cancel.argtypes, self._cancel.restype = [_P, _P], _I
        self._under_way: dict[int, tuple[Job, object]] = {}  # by address
        self._pool = self._open(threads)
        if not self._pool:
            raise OSError("no thread can be started")

    def submit(self, job: Job, buffer: object) -> None:
        """Start; `buffer` is what the job reads into. Both are kept until that is over."""
        at = ctypes.addressof(job)
        self._under_way[at] = job, buffer
        self._submit(self._pool, at)

    def promote(self, job: Job) -> None:
        """Read it before what is read ahead."""
        self._promote(self._pool, ctypes.addressof(job))

    def cancel(self, job: Job) -> bool:
        """Do not read it; False if a thread has begun to."""
        at = ctypes.addressof(job)
        if not self._cancel(self._pool, at):
            return False
        self._under_way.pop(at, None)
        return True

    def wait(self, job: Job) -> None:
        """Wait until it is read, or has failed."""
        at = ctypes.addressof(job)
        if job.state == WAITING:
            self._wait(self._pool, at)
        self._under_way.pop(at, None)

    def drain(self) -> None:
        """End everything: what nobody has begun is cancelled, the rest waited for."""
        for job, _ in list(self._under_way.values()):
            if not self.cancel(job):
                self.wait(job)

    def close(self) -> None:
        """End what is queued, then the threads."""
        self._close(self._pool)
        self._under_way.clear()
