"""Read stored tensors, or some rows or columns of them, as numpy arrays in their own types.

The types that only quantized safetensors have are here, too: bytes, and floats of 8 bits
(E4M3: arXiv 2209.05433, without infinities; E8M0: powers of two, of the OCP microscaling formats).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outsize.checkpoint.bounded import open_regular
from outsize.checkpoint.checkpoint import Tensor, pread
from outsize.checkpoint.coded import Bytes, Floats
from outsize.checkpoint.ggml import BlockType
from outsize.checkpoint.read_json import fail

Array = NDArray[Any]
FLOATS = ("F16", "BF16", "F32")


def _e4m3() -> Floats:
    """The number of each byte."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(exponent, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    size[byte & 127 == 127] = np.nan
    out: Floats = np.where(byte & 128, -size, size).astype(np.float32)
    return out


def _e8m0() -> Floats:
    """The number of each byte: two to the power of the byte less 127."""
    out: Floats = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)
    return out


E4M3, E8M0 = _e4m3(), _e8m0()
# By what a header calls them, beside the types of every safetensors file.
TYPES: dict[str, BlockType] = {
    "U8": BlockType("U8", 1, 1),
    "F8_E4M3": BlockType("F8_E4M3", 1, 1, lambda b: E4M3[b]),
    "F8_E8M0": BlockType("F8_E8M0", 1, 1, lambda b: E8M0[b]),
}
_NUMPY: dict[str, Any] = {
    "I8": np.int8, "I32": np.dtype("<i4"), "I64": np.dtype("<i8"), "U8": np.uint8,
    "F8_E4M3": np.uint8, "F8_E8M0": np.uint8, "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
}  # fmt: skip


def require(tensor: Tensor, types: Collection[str], *shapes: tuple[int, ...]) -> None:
    """Raises CheckpointError for another type than these, or none of these shapes (if there are any)."""
    if tensor.kind.name not in types:
        due = " or ".join(types)
        raise fail(tensor.path, f"tensor {tensor.name!r} has type {tensor.kind.name}, {due} is due")
    if shapes and tensor.shape not in shapes:
        due = " or ".join(str(shape) for shape in shapes)
        raise fail(tensor.path, f"tensor {tensor.name!r} has shape {tensor.shape}, {due} is due")


def require_matrix(tensor: Tensor, types: Collection[str]) -> None:
    """Raises CheckpointError unless it has one of these types, two axes, and numbers."""
    require(tensor, types)
    if len(tensor.shape) != 2 or not all(tensor.shape):
        raise fail(
            tensor.path, f"tensor {tensor.name!r} has shape {tensor.shape}, not rows and columns"
        )


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of a matrix, from `start` on, before `stop`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def whole(tensor: Tensor) -> Array:
    """All of a tensor, in its own shape. Raises CheckpointError if the file has shrunk."""
    with open_regular(tensor.path) as f:
        return _array(tensor, pread(f, tensor.offset, tensor.size, tensor.name), tensor.shape)


def rows(tensor: Tensor, span: Span) -> Array:
    """Some of a tensor along its first axis."""
    size = tensor.size // tensor.shape[0]
    with open_regular(tensor.path) as f:
        raw = pread(f, tensor.offset + span.start * size, len(span) * size, tensor.name)
    return _array(tensor, raw, (len(span), *tensor.shape[1:]))


def columns(tensor: Tensor, span: Span) -> Array:
    """Some columns of a tensor of two axes: (R, columns)."""
    count, width = tensor.shape
    if span == Span(0, width):
        return whole(tensor)
    item = tensor.kind.size
    with open_regular(tensor.path) as f:
        starts = (tensor.offset + (i * width + span.start) * item for i in range(count))
        raw = b"".join(pread(f, at, len(span) * item, tensor.name) for at in starts)
    return _array(tensor, raw, (count, len(span)))


def _array(tensor: Tensor, raw: bytes | bytearray, shape: tuple[int, ...]) -> Array:
    return np.frombuffer(raw, _NUMPY[tensor.kind.name]).reshape(shape)


def floats(tensor: Tensor, stored: Array) -> Floats:
    """What some of a tensor of floats stands for, in fp32."""
    read = tensor.kind.read
    assert read is not None, tensor.kind.name
    raw = np.ascontiguousarray(stored).view(np.uint8)
    return read(raw.reshape(-1, tensor.kind.size)).reshape(stored.shape)


def nibbles(words: Array) -> Bytes:
    """(..., W) words of 32 bits -> (..., 8 W) numbers of 4 bits, the lowest first."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*words.shape[:-1], -1)


def each_group(change: np.ufunc, out: Floats, of_group: Array, group: int) -> None:
    """Change numbers (N, K) by what each group of inputs has (N, G), in their place; the last group may be
    shorter."""
    whole = out.shape[1] // group * group
    parts = [(out[:, :whole].reshape(len(out), -1, group), of_group[:, : whole // group, None])]
    parts += [(out[:, whole:], of_group[:, whole // group :])]
    with np.errstate(all="ignore"):  # what a foreign file has may be anything
        for numbers, own in parts:
            if numbers.size:
                change(numbers, own, out=numbers)


def half_of(tensor: Tensor) -> str:
    """How palettes name the type of these floats; "" if they have none for it."""
    return {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}.get(tensor.kind.name, "")
