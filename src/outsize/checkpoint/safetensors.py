"""Safetensors folders: config.json, tokenizer.json, one file or an index of shards.

The header is parsed here rather than through the `safetensors` package because the packer needs
offsets, not tensors, and because the same bounds are checked for every foreign file:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from outsize.checkpoint.bounded import open_regular, refuse_dangling
from outsize.checkpoint.checkpoint import Checkpoint, Tensor, pread
from outsize.checkpoint.file_names import SIDECARS
from outsize.checkpoint.ggml import BY_NAME, BlockType
from outsize.checkpoint.quantized import quantization
from outsize.checkpoint.read_json import fail as _fail
from outsize.checkpoint.read_json import parse_json, read_json
from outsize.checkpoint.safetensors_quantized import stored
from outsize.checkpoint.safetensors_quantized.join import join
from outsize.checkpoint.safetensors_quantized.scheme import Scheme
from outsize.checkpoint.safetensors_shards import weights
from outsize.checkpoint.tokenizer_settings import of_folder, sidecars
from outsize.errors import CheckpointError, UnsupportedError

MAX_HEADER = 64 << 20
METADATA = "__metadata__"
TYPES = {name: BY_NAME[name] for name in ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")}
CODES, SCALES = "_blocks", "_scales"  # the two tensors of a matrix in MXFP4


def parse(path: Path, types: Mapping[str, BlockType] = TYPES) -> dict[str, Tensor]:
    """The tensors of one file, of these types, bounds-checked; no tensor is read."""
    return tensors_of(path, *header(path), types)


def tensors_of(
    path: Path,
    said: Mapping[str, object],
    data: int,
    size: int,
    types: Mapping[str, BlockType] = TYPES,
) -> dict[str, Tensor]:
    """As `parse`, of a header that was read: what it says, where the data begin, the file's bytes."""
    tensors = {}
    for name, info in said.items():
        if name != METADATA:
            tensors[name] = _tensor(path, name, _info(path, name, info, types), data, size)
    ordered = sorted(tensors.values(), key=lambda t: t.offset)
    for one, two in pairwise(ordered):
        if one.offset + one.size > two.offset:
            raise _fail(path, f"tensors {one.name!r} and {two.name!r} overlap")
    return tensors


def header(path: Path, limit: int = MAX_HEADER) -> tuple[dict[str, object], int, int]:
    """The header of one file, where its data begin, and the file's bytes."""
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        if size < 8:
            raise _fail(path, f"{size} bytes, too short for a header")
        length = int.from_bytes(pread(f, 0, 8, "the header length"), "little")
        if length > min(size - 8, limit):
            raise _fail(path, f"a header of {length:,} bytes in a file of {size:,}")
        return parse_json(path, pread(f, 8, length, "the header")), 8 + length, size


def _naturals(value: object, limit: int) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > limit:
        return None
    good = all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    return tuple(value) if good else None


@dataclass(frozen=True, slots=True)
class _Info:
    """What a header says of a tensor."""

    kind: BlockType
    shape: tuple[int, ...]
    span: tuple[int, ...]  # its first byte, and the one after its last


def _info(path: Path, name: str, info: object, types: Mapping[str, BlockType]) -> _Info:
    if not isinstance(info, dict):
        raise _fail(path, f"tensor {name!r} has no description")
    dtype, shape = info.get("dtype"), _naturals(info.get("shape"), 8)
    span = _naturals(info.get("data_offsets"), 2)
    if not isinstance(dtype, str) or shape is None or span is None or len(span) != 2:
        raise _fail(path, f"tensor {name!r} has a malformed description")
    if dtype == "U8" and name.endswith((CODES, SCALES)):
        dtype = "I8"
    if dtype not in types:
        raise _strange(path, name, dtype)
    return _Info(types[dtype], shape, span)


def _strange(path: Path, name: str, dtype: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path.name}: tensor {name!r} has type {dtype}; outsize reads F32, F16 and BF16 "
        "safetensors: use the original checkpoint, not a quantized one, or a GGUF of it"
    )


def _tensor(path: Path, name: str, said: _Info, data: int, size: int) -> Tensor:
    kind, shape, (begin, end) = said.kind, said.shape, said.span
    if end < begin or end > size - data:
        raise _fail(path, f"tensor {name!r} claims bytes {begin:,} to {end:,} of {size - data:,}")
    if math.prod(shape) * kind.size != end - begin:
        raise _fail(
            path, f"tensor {name!r} {shape} {kind.name} does not fill {end - begin:,} bytes"
        )
    return Tensor(name, kind, shape, path, data + begin, end - begin)


def load(folder: Path, file: str = "") -> Checkpoint:
    """Parse a folder; `file` is one of its weights, or to be read alone. Reads headers and JSON only."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in this folder, so it is not a model")
    refuse_dangling(folder, SIDECARS)
    config = read_json(folder / "config.json")
    how = quantization(config, folder)
    tensors: dict[str, Tensor] = {}
    names = {p.name for p in folder.iterdir() if p.is_file()}
    found = weights(names, lambda name: read_json(folder / name), file, str(folder))
    paths = [folder / name for name in found]
    for path in paths:
        part = parse(path, TYPES if how is None else TYPES | stored.TYPES)
        twice = tensors.keys() & part.keys()
        if twice:
            raise _fail(path, f"tensor {min(twice)!r} is in two shards")
        tensors |= part
    tensors, biases = _joined(tensors, how)
    architecture = config.get("model_type")
    if not isinstance(architecture, str):
        raise _fail(folder / "config.json", "no 'model_type'")
    return Checkpoint(
        format="safetensors",
        architecture=architecture,
        config=config,
        tensors=tensors,
        tokenizer=of_folder(folder, config),
        files=tuple(paths),
        sidecars=sidecars(folder),
        perhaps_zero=biases,
    )


def _joined(
    tensors: dict[str, Tensor], how: Scheme | None
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Matrices that are stored in several tensors as one each, and the names of their biases."""
    if how is None:
        return _with_mxfp4(tensors), frozenset()
    made, biases = join(tensors, how)
    for t in made.values():
        if t.kind.name in stored.TYPES:
            raise _strange(t.path, t.name, t.kind.name)
    return made, biases


def _with_mxfp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Codes (..., groups, 16) and scales (..., groups) as one tensor under the plain name."""
    out = {k: t for k, t in tensors.items() if not k.endswith((CODES, SCALES))}
    for name in (k for k in tensors if k.endswith(CODES)):
        plain = name.removesuffix(CODES)
        codes, scales = tensors[name], tensors.get(plain + SCALES)
        if scales is None or codes.shape != (*scales.shape, 16) or len(scales.shape) < 2:
            raise _fail(codes.path, f"tensor {name!r} has no scales that fit it")
        shape = (*scales.shape[:-1], 32 * scales.shape[-1])
        out[plain] = Tensor(
            plain, BY_NAME["MXFP4"], shape, codes.path, codes.offset, codes.size, scales
        )
    return out
