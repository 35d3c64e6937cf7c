"""What a download or a packing leaves that was ended from outside (KILL, a power cut): hidden folders beside
the packs. A running one holds a lock; folders whose lock is free are shown, can be removed, and are removed
before the next download.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock

from outsize.errors import SourceError
from outsize.pack.lock import locked

FETCH, LOCK = ".fetch", ".lock"
GATE = ".leftovers.lock"  # held while folders and their locks come and go


@dataclass(frozen=True, slots=True)
class Leftover:
    """A hidden folder that nobody works in any more."""

    path: Path
    size: int  # bytes


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A hidden folder for a download, locked while it is used, deleted at the end."""
    with ExitStack() as stack:
        with locked(folder / GATE):
            made = tempfile.TemporaryDirectory(FETCH, ".", folder, ignore_cleanup_errors=True)
            path = Path(stack.enter_context(made))
            stack.enter_context(locked(path / LOCK))
        yield path


def leftovers(folder: Path) -> list[Leftover]:
    """Those in a folder of packs."""
    found = [Leftover(path, _size(path)) for path in _hidden(folder)]
    return [one for one in found if _is_free(one.path)]


def clean(folder: Path) -> None:
    """Delete them."""
    with locked(folder / GATE):
        for one in leftovers(folder):
            shutil.rmtree(one.path, ignore_errors=True)


def remove(folder: Path, name: str) -> int:
    """Delete one by its name; its bytes. Raises SourceError."""
    with locked(folder / GATE):
        for one in leftovers(folder):
            if one.path.name == name:
                shutil.rmtree(one.path, ignore_errors=True)
                return one.size
    raise SourceError(f"{name!r} is nothing that was left behind, or a process is working in it")


def _hidden(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [p for p in sorted(folder.iterdir()) if p.name.startswith(".") and not p.is_symlink()]
    return [p for p in found if p.is_dir() and (p.name.endswith(FETCH) or ".tmp-" in p.name)]


def _is_free(path: Path) -> bool:
    """Does no process hold its lock? Of an unfinished pack, the lock is that of its name."""
    name = path.name.rpartition(".tmp-")[0]
    try:
        held = path.with_name(f"{name}.lock") if name else path / LOCK
        with locked(held, timeout=0) as is_alone:
            return is_alone
    except (filelock.Timeout, OSError):
        return False


def _size(path: Path) -> int:
    size = 0
    for p in path.rglob("*"):
        try:
            size += p.lstat().st_size
        except OSError:  # it went meanwhile
            continue
    return size
