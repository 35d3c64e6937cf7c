"""The file backend of record tables: files are read without filling the page cache, by O_DIRECT on Linux and
F_NOCACHE on macOS; elsewhere by plain reads whose pages are dropped at once."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

PAGE = 4096
# What file systems say that take O_DIRECT at opening, and refuse it at reading (FUSE, network mounts).
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


class File:
    """A record file, opened for reading. Offsets, lengths and buffers are multiples of PAGE. `is_direct`: do
    reads bypass the page cache?"""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle, self.is_direct = _open(path)

    def read(self, out: memoryview, offset: int) -> int:
        """Fill as much of `out` as comes at once; bytes read, 0 at the end. Raises OSError."""
        try:
            got = os.preadv(self._handle, [out], offset)
        except OSError as e:
            is_refused = self.is_direct and e.errno in REFUSALS
            if not is_refused or not _stop_direct(self._handle):
                raise
            self.is_direct = False
            got = os.preadv(self._handle, [out], offset)
        if not self.is_direct and sys.platform == "linux":
            os.posix_fadvise(self._handle, offset, got, os.POSIX_FADV_DONTNEED)
        return got

    def handle(self) -> int | None:
        """An open file that C may read from as `read` does; None: only `read` will do."""
        return self._handle if self.is_direct else None

    def stamp(self) -> tuple[int, int]:
        """(bytes, mtime in ns): changes when the file is written to."""
        found = os.fstat(self._handle)
        return found.st_size, found.st_mtime_ns

    def close(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


def _stop_direct(handle: int) -> bool:
    """Make an open file read through the page cache from now on, for all threads; False where that is no
    question. The handle stays, since threads of C may be reading from it."""
    if sys.platform != "linux":
        return False
    import fcntl

    fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~os.O_DIRECT)
    return True


def _open(path: Path) -> tuple[int, bool]:
    """A handle, and whether the page cache is bypassed. Raises OSError, also for what is no regular file, and
    never waits for a pipe's other end."""
    handle, is_direct = _open_direct(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no regular file")
    return handle, is_direct


def _open_direct(path: Path, flags: int) -> tuple[int, bool]:
    if sys.platform == "linux":
        try:
            return os.open(path, flags | os.O_DIRECT), True
        except OSError:  # some file systems refuse
            return os.open(path, flags), False
    handle = os.open(path, flags)
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(handle, fcntl.F_NOCACHE, 1)
        return handle, True
    return handle, False
