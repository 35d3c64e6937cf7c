"""Safetensors folders: config.json, tokenizer.json, one file or an index of shards.

The header is parsed here rather than through the `safetensors` package because the packer needs
offsets, not tensors, and because the same bounds are checked for every foreign file:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import cast

from outsize.checkpoint.foreign import Checkpoint, Config, Tensor, TokenizerSpec, file_size, pread
from outsize.checkpoint.ggml import BY_NAME
from outsize.checkpoint.quantized import refuse_quantized
from outsize.checkpoint.shards import weights
from outsize.errors import CheckpointError, UnsupportedError

MAX_HEADER = 64 << 20
MAX_JSON = 128 << 20
DTYPES = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
CODES, SCALES = "_blocks", "_scales"  # the two tensors of a matrix in MXFP4


def _fail(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {problem}; the file is damaged: fetch it again")


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, object]:
    """A JSON object from a file of bounded size. Raises CheckpointError."""
    size = file_size(path)
    if size > limit:
        raise _fail(path, f"{size:,} bytes of JSON, at most {limit:,} are allowed")
    return parse_json(path, path.read_bytes())


def parse_json(path: Path, raw: bytes | bytearray) -> dict[str, object]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise _fail(path, f"not JSON ({type(e).__name__})") from None
    if not isinstance(value, dict):
        raise _fail(path, f"the JSON is a {type(value).__name__}, not an object")
    return cast("dict[str, object]", value)


def parse(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, bounds-checked; no tensor is read."""
    size = file_size(path)
    if size < 8:
        raise _fail(path, f"{size} bytes, too short for a header")
    with open(path, "rb") as f:
        length = int.from_bytes(pread(f, 0, 8, "the header length"), "little")
        if length > min(size - 8, MAX_HEADER):
            raise _fail(path, f"a header of {length:,} bytes in a file of {size:,}")
        header = parse_json(path, pread(f, 8, length, "the header"))
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _tensor(path, name, info, data, size) for name, info in header.items()}
    ordered = sorted(tensors.values(), key=lambda t: t.offset)
    for one, two in pairwise(ordered):
        if one.offset + one.size > two.offset:
            raise _fail(path, f"tensors {one.name!r} and {two.name!r} overlap")
    return tensors


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


def shard_paths(folder: Path, file: str = "") -> list[Path]:
    """The weight files of a folder; `file` is one of them, or to be read alone."""
    names = {p.name for p in folder.iterdir() if p.is_file()}
    found = weights(names, lambda name: read_json(folder / name), file, str(folder))
    return [folder / name for name in found]


def load(folder: Path, file: str = "") -> Checkpoint:
    """Parse a folder, or of its weights one file. Reads headers and JSON only."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json in this folder, so it is not a model")
    config = read_json(folder / "config.json")
    refuse_quantized(config, folder)
    tensors: dict[str, Tensor] = {}
    paths = shard_paths(folder, file)
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
        tokenizer=_tokenizer(folder, config),
        files=tuple(paths),
        chat_template=_template(folder),
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


def _optional_json(path: Path) -> dict[str, object]:
    return read_json(path) if path.is_file() else {}


def _tokenizer(folder: Path, config: Config) -> TokenizerSpec:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no tokenizer.json in this folder; save it with the tokenizer's "
            "save_pretrained (fast tokenizer)"
        )
    raw = path.read_bytes() if file_size(path) <= MAX_JSON else b""
    parse_json(path, raw)
    generation = _optional_json(folder / "generation_config.json")
    settings = _optional_json(folder / "tokenizer_config.json")
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    bos = config.get("bos_token_id")
    add_bos = settings.get("add_bos_token", False)
    listed = ends if isinstance(ends, list) else [ends]
    return TokenizerSpec(
        json=raw.decode("utf-8", "replace"),
        bos=bos if isinstance(bos, int) else None,
        eos=tuple(e for e in listed if isinstance(e, int)),
        add_bos=add_bos is True,
    )


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file() and file_size(path) <= 1 << 20:
        return path.read_text(encoding="utf-8", errors="replace")
    template = _optional_json(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None
