"""GGUF v2 and v3, read only, hostile until proven.

Every count, length, offset and product is checked against the real size of the file before a byte
is allocated for it; Python's integers do not overflow, so a product is compared as it is. Specification:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from outsize.checkpoint.foreign import Checkpoint, Tensor, TokenizerSpec, file_size, pread
from outsize.checkpoint.ggml import TYPES, other_type
from outsize.errors import CheckpointError, UnsupportedError

MAX_ITEMS = 3_000_000  # strings and arrays in one header; the largest vocabularies have 0.8 million
MAX_DEPTH = 4
MAX_RANK = 4
MAX_NAME = 1 << 16
WINDOW = 1 << 20

SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4",
    7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
STRING, ARRAY = 8, 9


class Cursor:
    """A bounds-checked walk over the header of one file, through a window of it."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size
        self.start, self.window, self.at = 0, b"", 0
        self.items = 0

    @property
    def offset(self) -> int:
        return self.start + self.at

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path.name}: {problem} (byte {self.offset:,} of {self.size:,}); "
            "the file is damaged or not a GGUF: fetch it again"
        )

    def need(self, count: int, what: str) -> None:
        """Have `count` more bytes in the window."""
        if count > self.size - self.offset:
            raise self.fail(f"{what} needs {count:,} bytes, {self.size - self.offset:,} are left")
        if self.at + count > len(self.window):
            self.start, self.at = self.offset, 0
            length = min(max(count, WINDOW), self.size - self.start)
            self.window = bytes(pread(self.file, self.start, length, what))

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        self.at += count
        return self.window[self.at - count : self.at]

    def number(self, kind: str, what: str) -> int:
        return int(struct.unpack("<" + kind, self.take(struct.calcsize(kind), what))[0])

    def count_item(self, number: int = 1) -> None:
        self.items += number
        if self.items > MAX_ITEMS:
            raise self.fail(f"more than {MAX_ITEMS:,} strings and arrays in the header")

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.number("Q", what)
        if limit is not None and length > limit:
            raise self.fail(f"{what} is {length:,} bytes long, at most {limit:,} are allowed")
        return self.take(length, what).decode("utf-8", "replace")

    def strings(self, count: int, what: str) -> list[str]:
        """The hot loop of a header: up to half a million short strings."""
        if count * 8 > self.size - self.offset:
            raise self.fail(f"{what} claims {count:,} strings, which the file cannot hold")
        self.count_item(count)
        out, unpack = [], struct.Struct("<Q").unpack_from
        for _ in range(count):
            self.need(8, what)
            (length,) = unpack(self.window, self.at)
            self.at += 8
            self.need(length, what)
            out.append(self.window[self.at : self.at + length].decode("utf-8", "replace"))
            self.at += length
        return out

    def array(self, what: str, depth: int) -> object:
        kind, count = self.number("I", what), self.number("Q", what)
        if kind == STRING:
            return self.strings(count, what)
        if kind == ARRAY:
            return self.nested(count, what, depth + 1)
        dtype = self.scalar(kind, what)
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)

    def nested(self, count: int, what: str, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise self.fail(f"{what} nests arrays deeper than {MAX_DEPTH}")
        if count * 12 > self.size - self.offset:
            raise self.fail(f"{what} claims {count:,} arrays, which the file cannot hold")
        self.count_item(count)
        return [self.array(what, depth) for _ in range(count)]

    def scalar(self, kind: int, what: str) -> np.dtype[np.generic]:
        if kind not in SCALARS:
            raise self.fail(f"{what} has value type {kind}, which GGUF does not define")
        return np.dtype(SCALARS[kind])

    def value(self, what: str) -> object:
        kind = self.number("I", what)
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what, 0)
        dtype = self.scalar(kind, what)
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a (possibly split) GGUF."""

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, Tensor]


def parse(path: Path) -> Part:
    """The header of one file. Raises CheckpointError or UnsupportedError."""
    with open(path, "rb") as f:
        return _parse(Cursor(f, path, file_size(path)))


def _parse(c: Cursor) -> Part:
    magic = c.take(4, "the magic number") if c.size >= 4 else b""
    if magic != b"GGUF":
        raise CheckpointError(f"{c.path.name}: not a GGUF file (it begins with {magic!r})")
    version = c.number("I", "the version")
    if version not in (2, 3):
        raise UnsupportedError(
            f"{c.path.name}: GGUF version {version}, outsize reads versions 2 and 3 "
            "(little-endian); convert the model again with a current tool"
        )
    num_tensors, num_keys = c.number("Q", "tensor count"), c.number("Q", "key count")
    if num_tensors * 24 + num_keys * 13 > c.size - c.offset:
        raise c.fail(f"claims {num_tensors:,} tensors and {num_keys:,} keys, which cannot fit")
    metadata = _metadata(c, num_keys)
    infos = _infos(c, num_tensors)
    return Part(c.path, metadata, _place(c, infos, metadata.get("general.alignment", 32)))


def _metadata(c: Cursor, count: int) -> dict[str, object]:
    out: dict[str, object] = {}
    c.count_item(count)
    for _ in range(count):
        key = c.string("a metadata key", MAX_NAME)
        if key in out:
            raise c.fail(f"metadata key {key!r} appears twice")
        out[key] = c.value(f"metadata {key!r}")
    return out


Info = tuple[str, int, tuple[int, ...], int]  # name, type, shape, offset


def _infos(c: Cursor, count: int) -> list[Info]:
    c.count_item(count)
    out: list[Info] = []
    for _ in range(count):
        name = c.string("a tensor name", MAX_NAME)
        rank = c.number("I", f"the rank of tensor {name!r}")
        if not 1 <= rank <= MAX_RANK:
            raise c.fail(f"tensor {name!r} has {rank} dimensions, 1 to {MAX_RANK} are allowed")
        dims = struct.unpack(f"<{rank}Q", c.take(8 * rank, f"the shape of tensor {name!r}"))
        kind, offset = c.number("I", f"the type of {name!r}"), c.number("Q", f"offset of {name!r}")
        out.append((name, kind, dims[::-1], offset))
    return out


def _place(c: Cursor, infos: list[Info], alignment: object) -> dict[str, Tensor]:
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment % 8:
        raise c.fail(f"alignment {alignment!r}: it must be a multiple of 8 up to 1,048,576")
    data = -(-c.offset // alignment) * alignment
    out: dict[str, Tensor] = {}
    for name, kind, shape, offset in infos:
        if name in out:
            raise c.fail(f"tensor {name!r} appears twice")
        out[name] = _tensor(c, name, kind, shape, data, offset, alignment)
    _refuse_overlap(c, list(out.values()))
    return out


def _tensor(
    c: Cursor, name: str, kind: int, shape: tuple[int, ...], data: int, offset: int, alignment: int
) -> Tensor:
    if kind not in TYPES:
        raise UnsupportedError(
            f"{c.path.name}: tensor {name!r} has type {other_type(kind)}; outsize cannot read it: "
            "use a file quantized as Q4_0, Q4_K_M, Q8_0 or the like"
        )
    block, count = TYPES[kind], math.prod(shape)
    if count == 0 or shape[-1] % block.length:
        raise c.fail(f"tensor {name!r} of type {block.name} has shape {shape}")
    size = count // block.length * block.size
    if offset % alignment:
        raise c.fail(f"tensor {name!r} starts at offset {offset}, not a multiple of {alignment}")
    if size > c.size - data - offset:
        raise c.fail(
            f"tensor {name!r} {shape} needs bytes {data + offset:,} to {data + offset + size:,}"
        )
    return Tensor(name, block, shape, c.path, data + offset, size)


def _refuse_overlap(c: Cursor, tensors: list[Tensor]) -> None:
    ordered = sorted(tensors, key=lambda t: t.offset)
    for one, two in pairwise(ordered):
        if one.offset + one.size > two.offset:
            raise c.fail(f"tensors {one.name!r} and {two.name!r} overlap")


def split_paths(path: Path) -> list[Path]:
    """All parts of a split model, in order; just `path` for a single file."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", path.name)
    if not match:
        return [path]
    stem, _, count, suffix = match.groups()
    if not 1 <= int(count) <= 1024:
        raise CheckpointError(f"{path.name}: a model of {int(count)} parts; 1 to 1024 are allowed")
    parts = [path.with_name(f"{stem}-{i + 1:05}-of-{count}{suffix}") for i in range(int(count))]
    missing = [p.name for p in parts if not p.is_file()]
    if missing:
        raise CheckpointError(
            f"{path.name}: {len(missing)} of {len(parts)} parts are missing, the first is "
            f"{missing[0]}; put them in the same folder"
        )
    return parts


def load(path: Path) -> Checkpoint:
    """Parse a single or split GGUF. Reads headers only."""
    parts = [parse(p) for p in split_paths(path)]
    head = parts[0].metadata
    tensors: dict[str, Tensor] = {}
    for part in parts:
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise CheckpointError(f"{part.path.name}: tensor {min(twice)!r} is in two parts")
        tensors |= part.tensors
    claimed = head.get("split.tensors.count", len(tensors))
    if claimed != len(tensors):
        raise CheckpointError(f"{path.name}: {claimed} tensors promised, {len(tensors)} found")
    architecture = head.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path.name}: no 'general.architecture': is it a language model?")
    template, licence = head.get("tokenizer.chat_template"), head.get("general.license")
    return Checkpoint(
        format="gguf",
        architecture=architecture,
        config=head,
        tensors=tensors,
        tokenizer=_tokenizer(head),
        files=tuple(p.path for p in parts),
        chat_template=template if isinstance(template, str) else None,
        licence=licence if isinstance(licence, str) else None,
    )


def _tokenizer(head: dict[str, object]) -> TokenizerSpec:
    prefix = "tokenizer.ggml."
    arrays = {k.removeprefix(prefix): v for k, v in head.items() if k.startswith(prefix)}
    ends = [arrays.get(k) for k in ("eos_token_id", "eot_token_id", "eom_token_id")]
    bos = arrays.get("bos_token_id")
    # SentencePiece files that do not say so expect a start token; byte-level BPE files do not.
    default = arrays.get("model") == "llama"
    return TokenizerSpec(
        arrays=arrays,
        bos=bos if isinstance(bos, int) else None,
        eos=tuple(dict.fromkeys(e for e in ends if isinstance(e, int))),
        add_bos=bool(arrays.get("add_bos_token", default)),
    )
