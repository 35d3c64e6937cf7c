"""Where a pack came from, whether that is still what it was, and which packs are of the same parts.

A pack's identity is all that decides an answer: the weights, and beside them config, tokenizer, templates and
generation settings. Its layout is what its records are made of, and how. Packs that differ in identity, but
not in weights and layout, share their records.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from outsize.checkpoint.bounded import read_regular
from outsize.checkpoint.read_json import MAX_JSON
from outsize.checkpoint.tokenizer_settings import sidecars
from outsize.pack.tensors import Record, TablePlan

FileStat = tuple[str, int, int, int]  # path, bytes, time of the last change in ns, inode


@dataclass(frozen=True, slots=True)
class Source:
    """Where a pack came from."""

    spec: str
    sha256: str  # of the weights' files
    size: int
    files: tuple[FileStat, ...]  # that hold weights
    encoding: str  # what was asked for: "auto" or an encoding's name
    sidecars: tuple[FileStat, ...] = ()  # the files beside them that decide an answer
    identity: str = ""  # SHA-256 of the weights' and the sidecars' bytes
    layout: str = ""  # of what the records hold
    kin: tuple[
        str, ...
    ] = ()  # `sha256` of packs whose numbers this one's were made from, the nearest first

    def is_current(self) -> bool:
        """Are the files still what they were, and are there no further ones?"""
        try:
            return self._is_current()
        except OSError:
            return False

    def _is_current(self) -> bool:
        weights = [Path(stat[0]) for stat in self.files]
        beside = sidecars(weights[0].parent) if weights[0].suffix == ".safetensors" else ()
        return (self.files, self.sidecars) == (file_stats(weights), file_stats(beside))

    def is_superseded(self) -> bool:
        """Has the hub's cache another revision than the one that was packed?"""
        path = Path(self.files[0][0])
        repo = next((p.parent for p in path.parents if p.name == "snapshots"), None)
        if repo is None or not (repo / "refs" / "main").is_file():
            return False
        revision = path.relative_to(repo / "snapshots").parts[0]
        newest = (repo / "refs" / "main").read_text(encoding="utf-8").strip()
        inside = path.relative_to(repo / "snapshots" / revision)
        return newest != revision and (repo / "snapshots" / newest / inside).is_file()


def derived(base: Source, name: str, recipe: Mapping[str, object]) -> Source:
    """The source of a pack that is made from another one's numbers, as a recipe says: another model, with
    other weights. `name`: what stands for an encoding."""
    text = json.dumps([base.sha256, base.layout, recipe], sort_keys=True)
    sha = hashlib.sha256(text.encode()).hexdigest()
    whole = hashlib.sha256(f"{base.identity} {sha}".encode()).hexdigest()
    kin = (base.sha256, *base.kin)
    return replace(base, sha256=sha, encoding=name, identity=whole, layout=sha, kin=kin)


def file_stats(files: Iterable[Path]) -> tuple[FileStat, ...]:
    """What tells a changed file from an unchanged one. A link keeps its own name."""
    stats = [(os.path.abspath(p), os.stat(p)) for p in files]
    return tuple((p, s.st_size, max(s.st_mtime_ns, s.st_ctime_ns), s.st_ino) for p, s in stats)


def identity(weights: str, beside: Iterable[Path]) -> str:
    """Of weights with this hash and the files beside them."""
    digest, files = hashlib.sha256(weights.encode()), list(beside)
    for path in files:
        content = read_regular(path, MAX_JSON)
        digest.update(b"\n%b %d\n" % (os.fsencode(path.name), len(content)) + content)
    return digest.hexdigest() if files else weights


def layout_hash(tables: Sequence[TablePlan]) -> str:
    """A hash of what goes into which record, in which encoding."""
    digest = hashlib.sha256()
    for table in tables:
        header = table.header
        digest.update(repr((header.name, header.kind, header.keys, header.stride)).encode())
        for record in table.records:
            digest.update(repr([*_contents(record)]).encode())
    return digest.hexdigest()


def _contents(record: Record) -> Iterable[object]:
    for name, pieces in record.items():
        for piece in pieces:
            parts = [
                (p.tensor.name, p.tensor.kind.name, p.tensor.shape, p.tensor.offset, p.head_dim, p.shift,
                 p.transposed, p.first, p.step, *((p.rotated,) if p.rotated else ()))
                for p in piece.parts
            ]  # fmt: skip
            yield name, piece.encoding, parts
