"""The folder of blocks on disk: who owns it, how much is in it, how much was written today.

Several processes may use it at once: what is counted or removed is under a lock, and files appear by rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from outsize.checkpoint.read_json import loads
from outsize.errors import CheckpointError, OptionError
from outsize.home import home
from outsize.pack.lock import locked
from outsize.prefix.file import SUFFIX, VERSION
from outsize.prefix.spec import PrefixSpec

NAME, MARK, WRITTEN, LOCK, PART = "prefixes", "format", "written.json", "lock", ".part"
SHARE, MOST = 0.1, 10 * 10**9  # of the free disk, by default
STALE_S = 600.0  # a part that old belongs to no process that still writes


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in the folder, in bytes."""

    folder: Path
    blocks: int
    size: int
    written_today: int


def folder_of() -> Path:
    return home() / NAME


def prepare(spec: PrefixSpec) -> tuple[Path, int, bool]:
    """The folder, made if need be; how many bytes it may hold; and whether it can be written to. Raises
    OptionError for a folder that is not ours, of another version, or too small a disk."""
    folder = folder_of()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise OptionError(
            f"prefix_cache: {folder} cannot be made ({e.strerror}); choose another OUTSIZE_HOME, or "
            "prefix_cache=memory"
        ) from None
    _check_owner(folder)
    is_writable = os.access(folder, os.W_OK)
    _check_version(folder, is_writable)
    free, there = shutil.disk_usage(folder).free, sum(size for _, size, _ in blocks(folder))
    if spec.size is not None and spec.size > free + there:
        raise OptionError(
            f"prefix_cache may take {spec.size / 1e9:,.1f} GB, and the disk of {folder} has "
            f"{free / 1e9:,.1f} GB free beside "
            f"the {there / 1e9:,.1f} GB in it; give a smaller size, or make room"
        )
    if is_writable:
        sweep(folder)
    return folder, spec.size or min(MOST, int(SHARE * free) + there), is_writable


def _check_owner(folder: Path) -> None:
    found = os.stat(folder)
    if os.name == "posix" and found.st_uid != os.getuid():
        raise OptionError(
            f"prefix_cache: {folder} belongs to another user (number {found.st_uid}), who could change "
            "answers; choose another OUTSIZE_HOME, or prefix_cache=memory"
        )


def _check_version(folder: Path, is_writable: bool) -> None:
    mark = folder / MARK
    try:
        found = mark.read_text(encoding="ascii", errors="replace")[:20].strip()
    except FileNotFoundError:
        if is_writable:
            with contextlib.suppress(OSError):
                mark.write_text(f"{VERSION}\n", encoding="ascii")
        return
    except OSError as e:
        raise OptionError(f"prefix_cache: {mark} cannot be read ({e.strerror})") from None
    if found != str(VERSION):
        raise OptionError(
            f"prefix_cache: {folder} was made by another version of outsize (format {found!r}, this one "
            f"has {VERSION}); `outsize cache clear` empties it"
        )


def blocks(folder: Path) -> Iterator[tuple[str, int, float]]:
    """(file name, bytes, last use) of each block."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX):
                with contextlib.suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    yield entry.name, found.st_size, found.st_mtime


def sweep(folder: Path) -> None:
    """Remove what a process that was killed had begun to write."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(PART):
                with contextlib.suppress(OSError):
                    if entry.stat().st_mtime < time.time() - STALE_S:
                        os.unlink(entry.path)


def _today() -> str:
    return time.strftime("%Y-%m-%d")


def written_today(folder: Path) -> int:
    """Bytes; nothing where that is not known."""
    try:
        found = loads((folder / WRITTEN).read_bytes()[:1000])
    except (OSError, CheckpointError):
        return 0
    if not isinstance(found, dict) or found.get("day") != _today():
        return 0
    size = found.get("bytes")
    return max(0, size) if isinstance(size, int) else 0


def take_room(folder: Path, size: int, most: int, daily: int) -> str:
    """Make room for a file of `size` bytes, and count it as written; else why not. Raises OSError."""
    with locked(folder / LOCK):
        written = written_today(folder)
        if written + size > daily:
            return f"{written / 1e9:,.1f} GB were written today, of {daily / 1e9:,.1f} GB (writes=SIZE)"
        if size > most:
            return (
                f"a block takes {size / 1e6:,.0f} MB, and all of them {most / 1e6:,.0f} MB at most"
            )
        found = sorted(blocks(folder), key=lambda block: block[2])
        there = sum(block[1] for block in found)
        for name, its, _ in found:
            if there + size <= most:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(folder / name)
            there -= its
        text = json.dumps({"day": _today(), "bytes": written + size})
        part = folder / f"{WRITTEN}{PART}"
        part.write_text(text, encoding="ascii")
        os.replace(part, folder / WRITTEN)
    return ""


def contents() -> Contents:
    """What `outsize cache` shows."""
    folder = folder_of()
    sizes = [size for _, size, _ in blocks(folder)]
    return Contents(folder, len(sizes), sum(sizes), written_today(folder))


def clear() -> Contents:
    """Empty the folder, but for today's count; what was in it."""
    before = contents()
    if not before.folder.is_dir():
        return before
    with locked(before.folder / LOCK):
        for path in before.folder.iterdir():
            if path.name.endswith((SUFFIX, PART)) or path.name == MARK:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
    return before
