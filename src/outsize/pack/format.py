"""The pack: what the engine runs. A folder of

    pack.json        what is in it: description, tables, tokenizer settings, a checksum of itself
    *.records        one file a table: equally long records, each padded to 4096 bytes
    tokenizer.json.gz

A table holds layers (a record is one layer's attention, or feed-forward), experts (a record is one expert
of one layer) or rows (a record is a block of consecutive rows of an embedding or a head). A record's
checksum is the CRC-32 of all of it.

A header is read as a foreign file is: its types, bounds, shapes and places are checked (pack/layout.py)
before anything relies on them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from outsize.checkpoint.typed_json import read_fields
from outsize.encoding import int4
from outsize.errors import PackError
from outsize.family import bounds
from outsize.model_config import Description
from outsize.pack import layout, tokenizer_file
from outsize.pack.source import Source
from outsize.pack.tables import TableHeader

VERSION = 2
HEADER = "pack.json"
LAYOUTS = {"int4": int4.LAYOUT}
MOST_HEADER = 8 << 20  # bytes; the largest known mixture's is 1 MB


@dataclass(frozen=True, slots=True)
class Quality:
    """How far a pack's numbers take it from those that they were made of, on a text."""

    bits: float  # of a weight of the layers' matrices, everything counted
    kl: float  # mean divergence of its predictions from the former ones, in nats
    top1: float  # share of predictions whose likeliest token is the same
    perplexity: float
    former_perplexity: float
    tokens: int
    text: str  # which

    def __str__(self) -> str:
        return (
            f"{self.bits:.2f} bits a weight, lossy: KL {self.kl:.3f} nats, top-1 {self.top1:.0%}, perplexity "
            f"{self.former_perplexity:,.1f} -> {self.perplexity:,.1f} ({self.tokens:,} tokens of {self.text})"
        )


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack's header, checked."""

    path: Path
    source: Source
    description: Description
    tables: tuple[TableHeader, ...]
    bos: int | None
    eos: tuple[int, ...]
    add_bos: bool
    tokenizer_crc: int
    special_tokens: Mapping[str, str]  # "bos_token" and the like, as chat templates name them
    chat_templates: Mapping[str, str]  # by name; "default" where there is one
    licence: str | None
    made_by: str
    quality: Quality | None = None  # of a pack that was made from another one, as measured then

    @property
    def size(self) -> int:
        return sum(table.size for table in self.tables)

    @property
    def encodings(self) -> tuple[str, ...]:
        found = {m.encoding for t in self.tables for ms in t.tensors.values() for m in ms}
        return tuple(sorted(found))

    def share_of(self, encodings: Collection[str]) -> float:
        """Of the bytes of one record of each table, times its records, how many are in these encodings."""
        named = found = 0
        for table in self.tables:
            for matrix in (m for ms in table.tensors.values() for m in ms):
                size = matrix.size * len(table.keys)
                named += size
                found += size if matrix.encoding in encodings else 0
        return found / max(1, named)

    def table_of(self, name: str) -> TableHeader:
        return next(t for t in self.tables if t.name == name)


def write_header(pack: Pack, folder: Path) -> None:
    """Write pack.json into `folder`. Raises PackError if it would be too long to be read."""
    body = {k: v for k, v in asdict(pack).items() if k != "path"}
    if pack.quality is None:  # other versions read packs that say nothing new
        del body["quality"]
    if not pack.source.kin:
        del body["source"]["kin"]
    if pack.description.shard is None:
        del body["description"]["shard"]
    body |= {"version": VERSION, "layouts": LAYOUTS}
    text = json.dumps(body, sort_keys=True)
    whole = {"checksum": zlib.crc32(text.encode()), "pack": body}
    text = json.dumps(whole, sort_keys=True, indent=1)
    if len(text) > MOST_HEADER:
        raise PackError(
            f"the pack's header would have {len(text):,} bytes, at most {MOST_HEADER:,} are read: too many "
            "or too long chat templates; remove some from the checkpoint"
        )
    (folder / HEADER).write_text(text, encoding="utf-8")


def read_header(folder: Path) -> Pack:
    """Read and check a pack.json. Raises PackError, saying how to pack again."""
    body = _body(folder)
    version, layouts = body.get("version"), body.get("layouts")
    if version != VERSION:
        raise damaged(folder, _other_version(version))
    if layouts != LAYOUTS:
        raise damaged(folder, f"it was packed for another machine's kernels ({str(layouts)[:80]})")
    stated = {k: v for k, v in body.items() if k not in ("version", "layouts")}
    try:
        pack = Pack(**_typed(stated), path=folder)
    except ValueError as e:
        raise damaged(
            folder, f"its header is of another version of outsize, or malformed ({e})"
        ) from None
    if problem := _fault(pack):
        raise damaged(folder, problem)
    return pack


def _body(folder: Path) -> dict[str, Any]:
    """What the header's checksum is of."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    path = folder / HEADER
    try:
        raw = _beginning(path) if path.is_file() else b""
        if len(raw) > MOST_HEADER:
            raise damaged(folder, f"its header has over {MOST_HEADER:,} bytes")
        whole = json.loads(raw, parse_constant=refuse)
        body = whole["pack"]
        good = zlib.crc32(json.dumps(body, sort_keys=True).encode()) == whole["checksum"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise damaged(folder, f"its header cannot be read ({type(e).__name__})") from None
    if not good or not isinstance(body, dict):
        raise damaged(folder, "its header does not match its checksum")
    return body


def _other_version(version: object) -> str:
    age = "an older" if isinstance(version, int) and version < VERSION else "another"
    return f"{age} outsize made it (format version {str(version)[:80]}, this is {VERSION})"


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as f:
        return f.read(MOST_HEADER + 1)


def _typed(body: dict[str, Any]) -> dict[str, Any]:
    """All fields of a pack but its place. Raises ValueError."""
    return read_fields(Pack, body, "", but="path")


def damaged(folder: Path, problem: str) -> PackError:
    return PackError(
        f"the pack {folder} is not usable: {problem}; "
        f"remove it with `outsize rm {folder.name}` and run the model again to repack it"
    )


def _fault(pack: Pack) -> str:
    """What is wrong with a header, beside its types, or with the files' sizes; "" if nothing is."""
    d = pack.description
    problem = bounds.fault(d) or layout.fault(d, pack.tables)
    problem = problem or next((p for t in pack.tables if (p := _file_fault(pack.path, t))), "")
    if problem:
        return problem
    if bad := [
        i
        for i in (*pack.eos, *([] if pack.bos is None else [pack.bos]))
        if not 0 <= i < d.vocab_size
    ]:
        return (
            f"token {bad[0]:,} starts or ends a text, and the embedding has {d.vocab_size:,} rows"
        )
    if pack.source.size < 0 or not pack.source.files:
        return "its source is no file"
    sized = tokenizer_file.is_sized(pack.path)
    return "" if sized else f"{tokenizer_file.NAME} is missing or too long"


def _file_fault(folder: Path, table: TableHeader) -> str:
    sums, path = table.checksums, folder / table.file
    if len(sums) != len(table.keys) or not all(0 <= s < 1 << 32 for s in sums):
        return f"table {table.name} has {len(sums):,} checksums for {len(table.keys):,} records"
    if not path.is_file():
        return f"{table.file} is missing"
    size = path.stat().st_size
    return "" if size == table.size else f"{table.file} has {size:,} bytes of {table.size:,}"
