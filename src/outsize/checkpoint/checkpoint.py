"""A checkpoint as the rest of outsize sees it, whatever its file format: config, tensors, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from outsize.checkpoint.bounded import open_regular
from outsize.checkpoint.coded import Bytes, Coded, Floats
from outsize.checkpoint.ggml import BlockType, Codes, coded, codes, dequantize
from outsize.checkpoint.ggml_small import joined_mxfp4
from outsize.errors import CheckpointError, UnsupportedError

Config = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor where it lies: nothing is read until `read`."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]  # last axis fastest
    path: Path
    offset: int
    size: int  # bytes
    scales: Tensor | None = None  # MXFP4 in two tensors: this one's bytes are the codes alone
    factor: Tensor | None = None  # of all numbers; in a stack of matrices, one for each
    joined: Joined | None = None  # a matrix in several tensors: offset and size are of the codes


class Numbers(Protocol):
    """What several stored tensors say together, read: numbers (N, K)."""

    def floats(self) -> Floats:
        """fp32, as the format's own definition has them."""
        ...

    def coded(self) -> Coded | None:
        """Codes in a form of kernels/palettes.py, where one holds them exactly."""
        ...

    def codes(self, encoding: str) -> Codes | None:
        """Codes for an encoding of 8 bits, where it holds them exactly."""
        ...


@dataclass(frozen=True, slots=True)
class Joined:
    """A matrix that is stored in several tensors, or some of its rows. `read`: of the parts, from a first row
    on, before another."""

    parts: Mapping[str, Tensor]
    read: Callable[[Mapping[str, Tensor], int, int], Numbers]
    start: int
    stop: int

    def numbers(self) -> Numbers:
        """Reads them. Raises CheckpointError, UnsupportedError."""
        return self.read(self.parts, self.start, self.stop)


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """A tokenizer as its checkpoint states it: a finished JSON, or the arrays of a GGUF. `added_tokens`:
    `added_tokens_decoder` of tokenizer_config.json, by id, which overrides flags and adds tokens."""

    json: str | bytes | None = None
    added_tokens: Mapping[str, object] = field(default_factory=dict)
    arrays: Mapping[str, object] = field(default_factory=dict)
    bos: int | None = None
    eos: tuple[int, ...] = ()  # every id that ends a text
    add_bos: bool = False
    names: Mapping[str, str] = field(
        default_factory=dict
    )  # "bos_token" and the like, for templates
    templates: Mapping[str, str] = field(default_factory=dict)  # chat templates by name


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A parsed, bounds-checked model on disk."""

    format: str  # "gguf" or "safetensors"
    architecture: str
    config: Config
    tensors: Mapping[str, Tensor]
    tokenizer: TokenizerSpec
    files: tuple[Path, ...]  # that hold the weights
    sidecars: tuple[Path, ...] = ()  # that decide an answer, too
    licence: str | None = None
    # Biases of matrices in GPTQ: its tools write zeros for those that have none.
    perhaps_zero: frozenset[str] = frozenset()


def read_raw(tensor: Tensor) -> Bytes:
    """The bytes of a tensor. Raises CheckpointError if the file has shrunk since it was parsed."""
    with open_regular(tensor.path) as f:
        raw = np.frombuffer(pread(f, tensor.offset, tensor.size, tensor.name), np.uint8)
    return raw if tensor.scales is None else joined_mxfp4(raw, read_raw(tensor.scales))


def pread(f: BinaryIO, offset: int, size: int, what: str) -> bytearray:
    """Exactly `size` bytes at `offset`."""
    out = bytearray(size)
    view, done = memoryview(out), 0
    f.seek(offset)
    while done < size:
        got = f.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(
                f"{f.name}: {what} ends {size - done} bytes early at byte {offset + done}; "
                "the file is truncated or was replaced while it was read: fetch it again"
            )
        done += got
    return out


def rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Some rows of a matrix (fewer at its end), as a tensor of their own."""
    num_rows, width = tensor.shape
    stop, row_bytes = min(stop, num_rows), tensor.size // num_rows
    shape, size = (stop - start, width), (stop - start) * row_bytes
    if tensor.joined is not None:
        first = tensor.joined.start
        some = replace(tensor.joined, start=first + start, stop=first + stop)
        return replace(tensor, shape=shape, size=size, joined=some)
    scales = None if tensor.scales is None else rows_of(tensor.scales, start, stop)
    offset = tensor.offset + start * row_bytes
    return replace(tensor, shape=shape, offset=offset, size=size, scales=scales)


def refuse_unreadable(tensor: Tensor) -> None:
    """Raises UnsupportedError, naming type and tensor, for a type whose numbers outsize does not know."""
    if not tensor.kind.is_readable and tensor.joined is None:
        raise UnsupportedError(
            f"{tensor.path.name}: tensor {tensor.name!r} has type {tensor.kind.name}, which outsize cannot "
            "read; use a file quantized as Q4_K_M, Q8_0, IQ4_XS or the like"
        )


def read_floats(tensor: Tensor) -> Floats:
    """A tensor's numbers as fp32 in its shape. Raises UnsupportedError."""
    refuse_unreadable(tensor)
    if tensor.joined is not None:
        return tensor.joined.numbers().floats()
    out = dequantize(tensor.kind, read_raw(tensor), tensor.shape)
    if tensor.factor is not None:
        with np.errstate(all="ignore"):
            out *= read_floats(tensor.factor).reshape(-1, *(1 for _ in tensor.shape[1:]))
    return out


def read_codes(tensor: Tensor, encoding: str) -> Codes | None:
    """A matrix's own codes for this encoding, or None if its type has none."""
    if tensor.joined is not None:
        return tensor.joined.numbers().codes(encoding)
    if tensor.factor is not None:
        return None
    rows, width = tensor.shape
    return codes(tensor.kind, read_raw(tensor), (rows, width), encoding)


def read_coded(tensor: Tensor) -> Coded | None:
    """A matrix as its file codes it, or None if its type has no codes of up to 6 bits, or it has a factor and
    its form no place for one."""
    if tensor.joined is not None:
        return tensor.joined.numbers().coded()
    rows, width = tensor.shape
    if tensor.factor is None:
        return coded(tensor.kind, read_raw(tensor), (rows, width))
    if tensor.kind.name != "NVFP4":
        return None
    found = coded(tensor.kind, read_raw(tensor), (rows, width))
    assert found is not None
    return replace(found, outer_N=np.full(rows, read_floats(tensor.factor).item(), np.float32))
