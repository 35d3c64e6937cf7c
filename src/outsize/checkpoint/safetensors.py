"""Safetensors folders: config.json, tokenizer.json, one file or an index of shards.

The header is parsed here rather than through the `safetensors` package because the packer needs
offsets, not tensors, and because the same bounds are checked for every foreign file:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from outsize.checkpoint.bounded import open_regular, refuse_dangling
from outsize.checkpoint.checkpoint import Checkpoint, Tensor, pread
from outsize.checkpoint.file_names import SIDECARS
from outsize.checkpoint.ggml import BY_NAME
from outsize.checkpoint.quantized import refuse_quantized
from outsize.checkpoint.read_json import fail as _fail
from outsize.checkpoint.read_json import parse_json, read_json
from outsize.checkpoint.safetensors_shards import weights
from outsize.checkpoint.tokenizer_settings import of_folder, sidecars
from outsize.errors import CheckpointError, UnsupportedError

MAX_HEADER = 64 << 20
METADATA = "__metadata__"
DTYPES = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
CODES, SCALES = "_blocks", "_scales"  # the two tensors of a matrix in MXFP4


def parse(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, bounds-checked; no tensor is read."""
    return tensors_of(path, *header(path))


def tensors_of(path: Path, said: Mapping[str, object], data: int, size: int) -> dict[str, Tensor]:
    """As `parse`, of a header that was read: what it says, where the data begin, the file's bytes."""
    named = {name: info for name, info in said.items() if name != METADATA}
    tensors = {name: _tensor(path, name, info, data, size) for name, info in named.items()}
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


def _tensor(path: Path, name: str, info: object, data: int, size: int) -> Tensor:
    if not isinstance(info, dict):
        raise _fail(path, f"tensor {name!r} has no description")
    dtype, shape = info.get("dtype"), _naturals(info.get("shape"), 8)
    span = _naturals(info.get("data_offsets"), 2)
    if not isinstance(dtype, str) or shape is None or span is None or len(span) != 2:
        raise _fail(path, f"tensor {name!r} has a malformed description")
    if dtype == "U8" and name.endswith((CODES, SCALES)):
        dtype = "I8"
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"{path.name}: tensor {name!r} has type {dtype}; outsize reads F32, F16 and BF16 "
            "safetensors: use the original checkpoint, not a quantized one, or a GGUF of it"
        )
    kind, (begin, end) = BY_NAME[dtype], span
    if end < begin or end > size - data:
        raise _fail(path, f"tensor {name!r} claims bytes {begin:,} to {end:,} of {size - data:,}")
    if math.prod(shape) * kind.size != end - begin:
        raise _fail(path, f"tensor {name!r} {shape} {dtype} does not fill {end - begin:,} bytes")
    return Tensor(name, kind, shape, path, data + begin, end - begin)


def load(folder: Path, file: str = "") -> Checkpoint:
    """Parse a folder; `file` is one of its weights, or to be read alone. Reads headers and JSON only."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in this folder, so it is not a model")
    refuse_dangling(folder, SIDECARS)
    config = read_json(folder / "config.json")
    refuse_quantized(config, folder)
    tensors: dict[str, Tensor] = {}
    names = {p.name for p in folder.iterdir() if p.is_file()}
    found = weights(names, lambda name: read_json(folder / name), file, str(folder))
    paths = [folder / name for name in found]
    for path in paths:
        part = parse(path)
        twice = tensors.keys() & part.keys()
        if twice:
            raise _fail(path, f"tensor {min(twice)!r} is in two shards")
        tensors |= part
    tensors = _with_mxfp4(tensors)
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
    )


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
