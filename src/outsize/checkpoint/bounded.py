"""Opening what others wrote: regular files alone, and no more of them than a limit.

A pipe under a model's name would keep its reader waiting for ever, a device may never end, and the size of a
sparse file says nothing about its worth: whoever reads says how much may come. Errors are of the class that
the caller names.
"""

from __future__ import annotations

import errno
import gzip
import os
import stat
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from outsize.errors import CheckpointError, OutsizeError

GZIP = b"\x1f\x8b"
MAX_LINE, MAX_TEXT = 8 << 20, 256 << 20  # bytes of a line, and of a text file once it is unpacked
KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip
Error = type[OutsizeError]


def regular_size(path: Path, error: Error = CheckpointError) -> int:
    """Bytes of a regular file. Raises `error` for anything else."""
    try:
        return _size(path, os.stat(path), error)
    except (OSError, ValueError) as e:
        raise error(_unreadable(path, e)) from None


def open_regular(path: Path, error: Error = CheckpointError) -> BinaryIO:
    """A regular file, open for reading; never waits for a pipe's other end. Raises `error`."""
    regular_size(path, error)  # a device may do something at being opened
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as e:
        raise error(_unreadable(path, e)) from None
    try:
        _size(path, os.fstat(file.fileno()), error)  # what was opened, whatever it was before
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: Path, limit: int, error: Error = CheckpointError) -> bytes:
    """All of a regular file of at most `limit` bytes. Raises `error`."""
    with open_regular(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise error(
                f"{path}: {size:,} bytes, at most {limit:,} are read; is it the right file?"
            )
        try:
            return file.read(limit + 1)[:limit]
        except OSError as e:
            raise error(_unreadable(path, e)) from None


def text_lines(path: Path, error: Error, limit: int = MAX_TEXT) -> Iterator[str]:
    """The lines of a UTF-8 text without their ends, unpacked if it is gzip; a pipe is read, too, as a shell's
    <(...) is one. Raises `error` for lines and files that are too long."""
    try:
        with open(path, "rb") as file:
            text = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == GZIP else file
            done, number = 0, 0
            while line := text.readline(MAX_LINE + 1):
                done, number = done + len(line), number + 1
                if len(line) > MAX_LINE or done > limit:
                    raise error(
                        f"{path}, line {number}: a line of more than {MAX_LINE:,} bytes, or more than "
                        f"{limit:,} in all; is this a text file? if so, cut it in several"
                    )
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except (OSError, EOFError, ValueError, zlib.error) as e:
        if isinstance(e, error):
            raise
        raise error(_unreadable(path, e)) from None


def refuse_dangling(folder: Path, names: Collection[str] = ()) -> None:
    """Raises CheckpointError for a link whose target is gone, as in a cache that was cleaned by half; of
    these names, if there are any."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists() and (path.name in names or not names):
            raise CheckpointError(_unreadable(path, FileNotFoundError(errno.ENOENT, "not there")))


def _size(path: Path, found: os.stat_result, error: Error) -> int:
    if not stat.S_ISREG(found.st_mode):
        what = next((name for is_kind, name in KINDS if is_kind(found.st_mode)), "something else")
        raise error(f"{path}: {what}, not a regular file; give the path of a file")
    return found.st_size


def _unreadable(path: Path, problem: Exception) -> str:
    if not isinstance(problem, OSError) or problem.strerror is None:
        return f"{path} cannot be read ({problem})"
    if os.path.islink(path) and not os.path.exists(path):
        return (
            f"{path}: a link to {os.readlink(path)}, which is not there; fetch the model again, or remove "
            "the link"
        )
    return f"{path} cannot be read ({problem.strerror})"
