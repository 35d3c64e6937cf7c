"""The pack: what the engine runs. A folder of

    pack.json        what is in it: description, tables, tokenizer settings, a checksum of itself
    *.records        one file a table: equally long records, each padded to 4096 bytes
    tokenizer.json

A table holds layers (a record is one layer's attention, or feed-forward), experts (a record is one expert
of one layer) or rows (a record is a block of consecutive rows of an embedding or a head). A record's
checksum is the CRC-32 of all of it.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from outsize.encoding import int4
from outsize.encoding.find import encoding
from outsize.encoding.plain import FieldSpec
from outsize.errors import PackError
from outsize.family.description import Description, from_json
from outsize.pack.source import Source

VERSION = 2
PAGE = 4096
ALIGN = 64
HEADER = "pack.json"
TOKENIZER = "tokenizer.json"
LAYOUTS = {"int4": int4.LAYOUT}


@dataclass(frozen=True, slots=True)
class Matrix:
    """One encoded matrix inside a record; a tensor is one or several, stacked along its rows."""

    encoding: str
    num_rows: int
    width: int
    offset: int  # of its first field, from the record's start

    @property
    def specs(self) -> dict[str, FieldSpec]:
        return encoding(self.encoding).specs(self.num_rows, self.width)

    def offsets(self) -> dict[str, int]:
        """Where each field starts in the record."""
        out, at = {}, self.offset
        for name, spec in self.specs.items():
            out[name] = at
            at += aligned(field_bytes(spec), ALIGN)
        return out

    @property
    def size(self) -> int:
        return sum(aligned(field_bytes(spec), ALIGN) for spec in self.specs.values())


@dataclass(frozen=True, slots=True)
class TableHeader:
    """One record file."""

    name: str
    kind: str  # "layers", "experts" or "rows"
    keys: tuple[int, ...]  # layer numbers; layer * experts + expert; or first rows
    stride: int
    tensors: Mapping[str, tuple[Matrix, ...]]
    checksums: tuple[int, ...]
    num_rows: int = 0  # of the whole matrix, for "rows"

    @property
    def file(self) -> str:
        return f"{self.name}.records"

    @property
    def size(self) -> int:
        return self.stride * len(self.keys)


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

    @property
    def chat_template(self) -> str | None:
        """The one to use where none is named."""
        templates = dict(self.chat_templates)
        return templates.get("default", next(iter(templates.values()), None))

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


def aligned(size: int, step: int) -> int:
    return -(-size // step) * step


def field_bytes(spec: FieldSpec) -> int:
    return math.prod(spec.shape) * torch.empty(0, dtype=spec.dtype).element_size()


def write_header(pack: Pack, folder: Path) -> None:
    """Write pack.json into `folder`."""
    body = {k: v for k, v in asdict(pack).items() if k != "path"}
    body |= {"version": VERSION, "layouts": LAYOUTS}
    text = json.dumps(body, sort_keys=True)
    whole = {"checksum": zlib.crc32(text.encode()), "pack": body}
    (folder / HEADER).write_text(json.dumps(whole, sort_keys=True, indent=1), encoding="utf-8")


def read_header(folder: Path) -> Pack:
    """Read and check a pack.json. Raises PackError, saying how to pack again."""
    try:
        whole = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        body = whole["pack"]
        good = zlib.crc32(json.dumps(body, sort_keys=True).encode()) == whole["checksum"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise damaged(folder, f"its header cannot be read ({type(e).__name__})") from None
    if not good:
        raise damaged(folder, "its header does not match its checksum")
    if body.get("version") != VERSION:
        raise damaged(folder, f"it has format version {body.get('version')}, this is {VERSION}")
    if body.get("layouts") != LAYOUTS:
        raise damaged(folder, f"it was packed for another machine's kernels ({body['layouts']})")
    try:
        return _pack(folder, body)
    except (KeyError, TypeError, ValueError) as e:
        raise damaged(folder, f"its header is malformed ({e})") from None


def damaged(folder: Path, problem: str) -> PackError:
    return PackError(
        f"the pack {folder} is not usable: {problem}; "
        f"remove it with `outsize rm {folder.name}` and run the model again to repack it"
    )


def _pack(folder: Path, body: dict[str, object]) -> Pack:
    known = {k: body[k] for k in Pack.__dataclass_fields__ if k in body}
    source = dict(body["source"])  # type: ignore[call-overload]
    for key in ("files", "sidecars"):
        source[key] = tuple((str(p), int(s), int(t), int(i)) for p, s, t, i in source[key])
    known |= {
        "path": folder,
        "source": Source(**source),
        "description": from_json(body["description"]),  # type: ignore[arg-type]
        "tables": tuple(_table(folder, t) for t in body["tables"]),  # type: ignore[attr-defined]
        "eos": tuple(body["eos"]),  # type: ignore[arg-type]
    }
    return Pack(**known)  # type: ignore[arg-type]


def _ints(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError(f"a list is due, not {value!r}")
    return tuple(int(v) for v in value)


def _table(folder: Path, item: dict[str, object]) -> TableHeader:
    tensors = {
        name: tuple(Matrix(**m) for m in matrices)
        for name, matrices in item["tensors"].items()  # type: ignore[attr-defined]
    }
    keys, sums = _ints(item["keys"]), _ints(item["checksums"])
    table = TableHeader(**(item | {"keys": keys, "checksums": sums, "tensors": tensors}))  # type: ignore[arg-type]
    path = folder / table.file
    if Path(table.file).name != table.file or not path.is_file():
        raise damaged(folder, f"{table.file} is missing")
    if path.stat().st_size != table.size:
        raise damaged(folder, f"{table.file} has {path.stat().st_size:,} bytes of {table.size:,}")
    return table
