"""The reading threads of reads.c."""

from __future__ import annotations

import ctypes

_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
WAITING, GOOD, FAILED, CANCELLED = range(4)


class Job(ctypes.Structure):
    """A record, or a part of it, on its way. Must outlive its reading."""

    _fields_ = (
        ("after", _P), ("out", _P), ("size", _L), ("offset", _L), ("piece", _L), ("taken", _L), ("left", _L),
        ("fd", _I), ("check", _I), ("crc", ctypes.c_uint32), ("bad", _I), ("urgent", _I), ("state", _I),
    )  # fmt: skip


class Reads:
    """A pool of threads; close it."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._open, self._close = library.reads_open, library.reads_close
        self._submit, self._promote = library.reads_submit, library.reads_promote
        self._cancel, self._wait = library.reads_cancel, library.reads_wait
        self._open.argtypes, self._open.restype = [_I], _P
        self._close.argtypes, self._close.restype = [_P], None
        for function in (self._submit, self._promote, self._wait):
            function.argtypes, function.restype = [_P, _P], None
        self._cancel.argtypes, self._cancel.restype = [_P, _P], _I
        self._pool = self._open(threads)
        if not self._pool:
            raise OSError("no thread can be started")

    def submit(self, job: Job) -> None:
        self._submit(self._pool, ctypes.addressof(job))

    def promote(self, job: Job) -> None:
        """What was read ahead is now waited for."""
        self._promote(self._pool, ctypes.addressof(job))

    def cancel(self, job: Job) -> bool:
        """True if nobody had begun it."""
        return bool(self._cancel(self._pool, ctypes.addressof(job)))

    def wait(self, job: Job) -> None:
        if job.state == WAITING:
            self._wait(self._pool, ctypes.addressof(job))

    def close(self) -> None:
        """End what is queued, then the threads."""
        self._close(self._pool)


def checksum(library: ctypes.CDLL, data: memoryview) -> int:
    """What zlib.crc32 gives."""
    function = library.checksum
    function.argtypes, function.restype = [_P, _L], ctypes.c_uint32
    at = ctypes.addressof(ctypes.c_char.from_buffer(data)) if len(data) else None
    return int(function(at, len(data)))
