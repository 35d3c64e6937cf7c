"""The packs of this user: where they live, which one belongs to a source, removing one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock
import platformdirs

from outsize.errors import PackError, SourceError
from outsize.pack.format import HEADER, Pack, read_header


def home() -> Path:
    """OUTSIZE_HOME, else the user's cache folder."""
    chosen = os.environ.get("OUTSIZE_HOME")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("outsize"))


def packs(folder: Path) -> Iterator[Pack | PackError]:
    """Every pack in a folder; those that cannot be read as the error that says why."""
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.name.startswith(".") or not (path / HEADER).is_file():
            continue
        try:
            yield read_header(path)
        except PackError as e:
            yield e


def find(folder: Path, spec: str, encoding: str, is_path: bool) -> Pack | None:
    """The pack made from this source, if its files have not changed since."""
    for pack in packs(folder):
        if isinstance(pack, PackError) or pack.source.encoding != encoding:
            continue
        if pack.source.spec == spec and (not is_path or _unchanged(pack)):
            return pack
    return None


def _unchanged(pack: Pack) -> bool:
    for path, size, mtime in pack.source.files:
        try:
            stat = os.stat(path)
        except OSError:
            return False
        if (stat.st_size, stat.st_mtime_ns) != (size, mtime):
            return False
    return True


def remove(folder: Path, name: str) -> int:
    """Delete a pack by its folder's name; its bytes. Raises SourceError."""
    path = folder / name
    if Path(name).name != name or name.startswith(".") or not path.is_dir():
        known = ", ".join(p.name for p in folder.glob("[!.]*")) if folder.is_dir() else ""
        raise SourceError(f"no pack named {name!r}; there are: {known or 'none'}")
    size = sum(p.stat().st_size for p in path.iterdir())
    with filelock.FileLock(folder / f".{name}.lock"):
        shutil.rmtree(path)
    return size
