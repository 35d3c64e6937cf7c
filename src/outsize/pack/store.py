"""The packs of this user: where they live, which one belongs to a source, removing one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from outsize.errors import PackError, SourceError
from outsize.pack import leftovers
from outsize.pack.format import HEADER, Pack, read_header
from outsize.pack.lock import locked
from outsize.pack.nested_file import beside
from outsize.pack.source import FileStat, Source
from outsize.pack.tables import TableHeader


def packs(folder: Path) -> Iterator[Pack | PackError]:
    """Every pack in a folder; those that cannot be read as the error that says why."""
    for path in _entries(folder):
        if path.name.startswith(".") or not (path / HEADER).is_file():
            continue
        try:
            yield read_header(path)
        except PackError as e:
            yield e


def _entries(folder: Path) -> list[Path]:
    """None of a folder that is not there, or not for this user to read."""
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except OSError:
        return []


def find(folder: Path, spec: str, encoding: str, is_path: bool, sha256: str = "") -> Pack | None:
    """The pack made from this source, if its files have not changed since; of a model on the hub, the
    newest, if its cache has no other revision. `sha256`: of the weights, where only one will do."""
    found = [p for p in _good(folder) if (p.source.spec, p.source.encoding) == (spec, encoding)]
    found = [p for p in found if sha256 in ("", p.source.sha256)]
    if is_path:
        return next((p for p in found if p.source.is_current()), None)
    current = [p for p in found if not p.source.is_superseded()]
    return max(current, key=lambda p: (p.path / HEADER).stat().st_mtime_ns, default=None)


def same_records(folder: Path, source: Source) -> Pack | None:
    """A pack that holds just the records that this source's would."""
    wanted = (source.sha256, source.layout)
    for pack in _good(folder):
        if (pack.source.sha256, pack.source.layout) == wanted:
            return pack
    return None


def nested_of(folder: Path, base: Pack, exact: bool = False) -> Pack | None:
    """The newest pack of nested experts that was cut out of this one, of those with an add-on if there are
    any (of others, making it was broken off); `exact`: none that was tuned, whose whole is another model."""
    sha = base.source.sha256
    found = [
        p
        for p in _good(folder)
        if p.source.kin[:1] == (sha,)
        and p.description.is_nested
        and not (exact and p.quality is not None)
    ]

    def worth(pack: Pack) -> tuple[bool, int]:
        return beside(pack).is_file(), (pack.path / HEADER).stat().st_mtime_ns

    return max(found, key=worth, default=None)


def known_hash(folder: Path, files: tuple[FileStat, ...]) -> str | None:
    """The hash of weights that were packed before and have not changed since."""
    found = (p.source for p in _good(folder) if not p.source.kin)
    return next((source.sha256 for source in found if source.files == files), None)


def _good(folder: Path) -> Iterator[Pack]:
    yield from (p for p in packs(folder) if isinstance(p, Pack))


def remove(folder: Path, name: str) -> int:
    """Delete a pack, or what an ended run left, by its folder's name; its bytes. Raises SourceError."""
    if name.startswith(".") and Path(name).name == name and (folder / name).is_dir():
        return leftovers.remove(folder, name)
    path = folder / name
    if Path(name).name != name or name.startswith(".") or not path.is_dir():
        known = ", ".join(p.name for p in folder.glob("[!.]*")) if folder.is_dir() else ""
        raise SourceError(f"no pack named {name!r}; there are: {known or 'none'}")
    with locked(folder / f".{name}.lock"):
        try:
            size = sum(map(_removed, [path, *folder.glob(f"{name}.ne[us]*")]))
        except FileNotFoundError:
            raise SourceError(f"no pack named {name!r}: another process removed it") from None
    return size


def _removed(path: Path) -> int:
    """Delete a folder of files, or a file; its bytes."""
    if path.is_dir():
        size = sum(p.stat().st_size for p in path.iterdir())
        shutil.rmtree(path)
        return size
    size = path.stat().st_size
    path.unlink()
    return size


def link(there: Path, here: Path) -> None:
    """The same bytes on disk where the file system can. Raises OSError."""
    try:
        os.link(there, here)
    except OSError:
        shutil.copyfile(there, here)


def link_tables(folder: Path, twin: Pack) -> tuple[TableHeader, ...] | None:
    """The records of another pack: the same bytes on disk where the file system can. None if that pack is
    gone."""
    try:
        for table in twin.tables:
            link(twin.path / table.file, folder / table.file)
    except FileNotFoundError:
        return None
    return twin.tables
