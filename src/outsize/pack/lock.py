"""Locks between processes, where the file system has them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import filelock

REFUSED = errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[bool]:
    """Hold a lock file, waiting for so many seconds, or as long as it takes. False if that keeps nobody out:
    some network mounts refuse locks, or grant each of them to everyone. Raises filelock.Timeout."""
    with ExitStack() as held:
        try:
            held.enter_context(filelock.FileLock(path, timeout))
        except NotImplementedError:  # what the library makes of ENOSYS
            yield False
            return
        except OSError as e:
            if e.errno not in REFUSED:
                raise
            yield False
            return
        yield not _is_granted(path)


def _is_granted(path: Path) -> bool:
    """Would a lock that is held be granted once more?"""
    try:
        with filelock.FileLock(path, timeout=0):
            return True
    except filelock.Timeout:
        return False
