"""GGUF v2 and v3, read only, hostile until proven.

Every count, length, offset and product is checked against the real size of the file before a byte
is allocated for it; Python's integers do not overflow, so a product is compared as it is. Specification:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from outsize.checkpoint.bounded import open_regular
from outsize.checkpoint.checkpoint import Checkpoint, Tensor
from outsize.checkpoint.file_names import PART, parts_of
from outsize.checkpoint.ggml import TYPES, other_type
from outsize.checkpoint.gguf_cursor import Cursor
from outsize.checkpoint.gguf_factors import with_factors
from outsize.checkpoint.tokenizer_settings import of_gguf
from outsize.errors import CheckpointError, UnsupportedError

MAX_RANK = 4
MAX_NAME = 1 << 16
KEY_ITEM, TENSOR_ITEM = 200, 1000  # bytes of memory that a key, or a tensor's description, takes


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a (possibly split) GGUF."""

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, Tensor]
    end: int  # the byte after its last tensor


def parse(path: Path) -> Part:
    """The header of one file. Raises CheckpointError or UnsupportedError."""
    with open_regular(path) as f:
        return _parse(Cursor(f, path, os.fstat(f.fileno()).st_size))


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
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment % 8:
        raise c.fail(f"alignment {alignment!r}: it must be a multiple of 8 up to 1,048,576")
    tensors = _place(c, infos, alignment)
    end = max([c.offset, *(t.offset + t.size for t in tensors.values())])
    return Part(c.path, metadata, tensors, -(-end // alignment) * alignment)


def _metadata(c: Cursor, count: int) -> dict[str, object]:
    out: dict[str, object] = {}
    c.keep(count * KEY_ITEM)
    for _ in range(count):
        key = c.string("a metadata key", MAX_NAME)
        if key in out:
            raise c.fail(f"metadata key {key!r} appears twice")
        out[key] = c.value(f"metadata {key!r}")
    return out


class Info(NamedTuple):
    """What a header says of a tensor."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int  # from where the data begin


def _infos(c: Cursor, count: int) -> list[Info]:
    c.keep(count * TENSOR_ITEM)
    out: list[Info] = []
    for _ in range(count):
        name = c.string("a tensor name", MAX_NAME)
        rank = c.number("I", f"the rank of tensor {name!r}")
        if not 1 <= rank <= MAX_RANK:
            raise c.fail(f"tensor {name!r} has {rank} dimensions, 1 to {MAX_RANK} are allowed")
        dims = struct.unpack(f"<{rank}Q", c.take(8 * rank, f"the shape of tensor {name!r}"))
        kind, offset = c.number("I", f"the type of {name!r}"), c.number("Q", f"offset of {name!r}")
        out.append(Info(name, kind, dims[::-1], offset))
    return out


def _place(c: Cursor, infos: list[Info], alignment: int) -> dict[str, Tensor]:
    data = -(-c.offset // alignment) * alignment
    out: dict[str, Tensor] = {}
    for info in infos:
        if info.name in out:
            raise c.fail(f"tensor {info.name!r} appears twice")
        if info.offset % alignment:
            raise c.fail(
                f"tensor {info.name!r} starts at offset {info.offset}, not a multiple of {alignment}"
            )
        out[info.name] = _tensor(c, info, data)
    _refuse_overlap(c, list(out.values()))
    return out


def _tensor(c: Cursor, info: Info, data: int) -> Tensor:
    name, kind, shape, offset = info
    if kind not in TYPES:
        raise UnsupportedError(
            f"{c.path.name}: tensor {name!r} has type {other_type(kind)}; outsize cannot read it: "
            "use a file quantized as Q4_K_M, Q8_0, IQ4_XS or the like"
        )
    block, count = TYPES[kind], math.prod(shape)
    if count == 0 or shape[-1] % block.length:
        raise c.fail(f"tensor {name!r} of type {block.name} has shape {shape}")
    size = count // block.length * block.size
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


def general_type(path: Path) -> str:
    """What a file says that it is: model, adapter, mmproj, imatrix, or "" where the general keys at its head
    do not say. Reads no further than those."""
    try:
        with open_regular(path) as f:
            c = Cursor(f, path, os.fstat(f.fileno()).st_size)
            c.take(16, "the head")
            for _ in range(c.number("Q", "key count")):
                key = c.string("a metadata key", MAX_NAME)
                if not key.startswith("general."):
                    break
                value = c.value(key)
                if key == "general.type":
                    return str(value)
    except (CheckpointError, OSError):
        return ""  # what is wrong with it, `parse` says
    return ""


def split_paths(path: Path) -> list[Path]:
    """All parts of a split model, in order; just `path` for a single file. The parts of a link lie beside
    it, or beside its target."""
    real = path.resolve()
    beside = real if PART.fullmatch(real.name) and not PART.fullmatch(path.name) else path
    parts = [beside.with_name(name) for name in parts_of(beside.name)]
    missing = [p.name for p in parts if not p.is_file()]
    if missing and beside != real and PART.fullmatch(real.name):
        return split_paths(real)
    if missing:
        raise CheckpointError(
            f"{path.name}: {len(missing)} of {len(parts)} parts are missing, the first is "
            f"{missing[0]}; put them in the same folder"
        )
    return parts


def _refuse_misnamed(parts: list[Part]) -> None:
    """Raises CheckpointError for a part of a split model under another name, or joined with others."""
    for i, part in enumerate(parts):
        count, number = (part.metadata.get(f"split.{k}", d) for k, d in (("count", 1), ("no", i)))
        if not isinstance(count, int) or not isinstance(number, int) or count <= 1:
            continue
        if (count, number) == (len(parts), i):
            continue
        name = part.path.name
        if len(parts) == 1 and _another_follows(part):
            raise CheckpointError(
                f"{name}: {count} parts of a split model, joined with cat, which makes no model of them; "
                "use the parts as they were, or join those with llama-gguf-split --merge"
            )
        match = PART.fullmatch(name)
        stem = match[1] if match else re.sub(r"\s*\(\d+\)$", "", part.path.stem) or "model"
        raise CheckpointError(
            f"{name}: this is part {number + 1} of {count} of a split model, which its name does not say; "
            f"name it {stem}-{number + 1:05}-of-{count:05}.gguf and put the other parts beside it"
        )


def _another_follows(part: Part) -> bool:
    """Does another GGUF begin where the tensors of this one end?"""
    with open_regular(part.path) as f:
        f.seek(part.end)
        return f.read(4) == b"GGUF"


NO_MODELS = {
    "adapter": "a LoRA adapter, not a model; --adapter takes one in PEFT's form (safetensors)",
    "mmproj": "a projector for images or sound (mmproj), not a language model",
    "imatrix": "an importance matrix for quantizing, not a model",
}


def _refuse_no_model(path: Path, head: dict[str, object], tensors: dict[str, Tensor]) -> None:
    kind = head.get("general.type")
    what = NO_MODELS.get(kind) if isinstance(kind, str) else None
    if head.get("general.architecture") == "clip":
        what = NO_MODELS["mmproj"]
    if not tensors:
        what = what or "a vocabulary without weights (no tensor), not a model"
    if what:
        raise UnsupportedError(f"{path.name} is {what}; give the .gguf of the model")


def load(path: Path) -> Checkpoint:
    """Parse a single or split GGUF. Reads headers only."""
    parts = [parse(p) for p in split_paths(path)]
    _refuse_misnamed(parts)
    head = parts[0].metadata
    tensors: dict[str, Tensor] = {}
    for part in parts:
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise CheckpointError(f"{part.path.name}: tensor {min(twice)!r} is in two parts")
        tensors |= part.tensors
    _refuse_no_model(path, head, tensors)
    claimed = head.get("split.tensors.count", len(tensors))
    if claimed != len(tensors):
        raise CheckpointError(f"{path.name}: {claimed} tensors promised, {len(tensors)} found")
    architecture = head.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path.name}: no 'general.architecture': is it a language model?")
    licence = head.get("general.license")
    return Checkpoint(
        format="gguf",
        architecture=architecture,
        config=head,
        tensors=with_factors(tensors),
        tokenizer=of_gguf(head),
        files=tuple(p.path for p in parts),
        licence=licence if isinstance(licence, str) else None,
    )
