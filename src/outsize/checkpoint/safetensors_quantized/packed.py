"""Integers of 4 or 8 bits as compressed-tensors stores them.

    pack-quantized: weight_packed (N, K / 8) int32, inputs packed, the lowest bits first (of 8 bits, 4 in an
                    int32); weight_scale (N, G); weight_zero_point (N / 8, G) int32, outputs packed, or (N, G)
                    int8; weight_shape, two numbers: N and K
    int-quantized:  weight (N, K) int8 (of 4 bits, too), weight_scale (N, G), weight_zero_point (N, G) int8

Packed numbers, zero points among them, have half their range added, so that they have no sign. Source:
PackedQuantizationCompressor of https://github.com/vllm-project/compressed-tensors.
Shapes: N rows, K inputs, G groups: one, or of so many inputs each; a single scale is that of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from outsize.checkpoint.checkpoint import Joined, Tensor
from outsize.checkpoint.coded import Bytes
from outsize.checkpoint.ggml import BlockType
from outsize.checkpoint.read_json import fail
from outsize.checkpoint.safetensors_quantized import gptq, integers, stored
from outsize.checkpoint.safetensors_quantized.integers import Integers
from outsize.checkpoint.safetensors_quantized.scheme import Weights
from outsize.checkpoint.safetensors_quantized.stored import Array, Span

CODES, SCALE, ZERO = "weight_packed", "weight_scale", "weight_zero_point"
SHAPE, GROUPS = "weight_shape", "weight_g_idx"


def shape_of(parts: Mapping[str, Tensor], weights: Weights) -> tuple[int, int]:
    """(N, K), if the integers are of so many bits. Raises CheckpointError."""
    if CODES in parts:
        stored.require_matrix(parts[CODES], ("I32",))
        rows, words = parts[CODES].shape
        return rows, words * (32 // weights.bits)
    stored.require_matrix(parts["weight"], ("I8",))
    rows, width = parts["weight"].shape
    return rows, width


def scale_shapes(parts: Mapping[str, Tensor], weights: Weights) -> tuple[tuple[int, ...], ...]:
    """What shapes the scales of such weights may have."""
    rows, width = shape_of(parts, weights)
    if weights.strategy == "tensor":
        return ((1,), (), (1, 1))
    return ((rows, -(-width // (weights.group or width))),)


def join(name: str, parts: Mapping[str, Tensor], weights: Weights) -> Tensor:
    """The matrix of these stored tensors, nothing read. Raises CheckpointError."""
    rows, width = shape_of(parts, weights)
    scale, zero = parts[SCALE], parts.get(ZERO)
    stored.require(scale, stored.FLOATS, *scale_shapes(parts, weights))
    codes = parts.get(CODES) or parts["weight"]
    if SHAPE in parts:
        stored.require(parts[SHAPE], ("I64", "I32"), (2,))
    elif CODES in parts:
        raise fail(codes.path, f"tensor {codes.name!r} has no {SHAPE}")
    if GROUPS in parts:
        stored.require(parts[GROUPS], ("I32",), (width,))
    if zero is not None:
        packed = (-(-rows // (32 // weights.bits)), -(-width // (weights.group or width)))
        stored.require(zero, ("I8", "I32"), packed if zero.kind.name == "I32" else scale.shape)
    elif not weights.symmetric:
        raise fail(codes.path, f"tensor {codes.name!r} has no {ZERO}")
    group, half = weights.group or width, stored.half_of(scale)
    kind = integers.encoding_of(weights.bits, group, width, half, not weights.symmetric)
    joined = Joined(parts, lambda p, a, b: _read(p, weights, Span(a, b)), 0, rows)
    size = sum(t.size for t in parts.values())
    block = BlockType(kind, 1, 1)
    return Tensor(name, block, (rows, width), codes.path, codes.offset, size, joined=joined)


def _read(parts: Mapping[str, Tensor], weights: Weights, span: Span) -> Integers:
    rows, width = shape_of(parts, weights)
    if SHAPE in parts and tuple(stored.whole(parts[SHAPE]).tolist()) != (rows, width):
        said = stored.whole(parts[SHAPE]).tolist()
        path, name = parts[SHAPE].path, parts[SHAPE].name
        raise fail(path, f"tensor {name!r} says {said}, and there are {rows:,} x {width:,} codes")
    group = weights.group or width
    if GROUPS in parts:
        gptq.refuse_reordered(parts[GROUPS], group)
    scale = stored.floats(parts[SCALE], _of_rows(parts[SCALE], span))
    zero = _zeros(parts, weights, span)
    half = stored.half_of(parts[SCALE])
    return Integers(weights.bits, group, half, _codes(parts, weights.bits, span), scale, zero)


def _codes(parts: Mapping[str, Tensor], bits: int, span: Span) -> Bytes:
    """Without sign."""
    if CODES in parts:
        return gptq.unpacked(stored.rows(parts[CODES], span), bits)
    tensor = parts["weight"]
    found: Bytes = stored.rows(tensor, span).view(np.uint8) + np.uint8(1 << (bits - 1))
    if (found >> bits if bits < 8 else found[:0]).any():
        raise fail(tensor.path, f"tensor {tensor.name!r} has integers of more than {bits} bits")
    return found


def _of_rows(tensor: Tensor, span: Span) -> Array:
    """(rows, G): what some rows have, as stored; a single one is that of each."""
    if math.prod(tensor.shape) > 1:
        return stored.rows(tensor, span)
    return np.repeat(stored.whole(tensor).reshape(1, 1), len(span), axis=0)


def _zeros(parts: Mapping[str, Tensor], weights: Weights, span: Span) -> int | Bytes:
    """Without sign: (N, G), or the middle of all codes where the weights are symmetric."""
    middle, zero = 1 << (weights.bits - 1), parts.get(ZERO)
    if zero is None:
        return middle
    if zero.kind.name == "I32":
        pack = 32 // weights.bits
        words = Span(span.start // pack, -(-span.stop // pack))
        found = gptq.unpacked(stored.rows(zero, words).T, weights.bits).T
        found = found[span.start - words.start * pack :][: len(span)]
    else:
        found = _of_rows(zero, span).view(np.uint8) + np.uint8(middle)
    if not weights.symmetric:
        return np.ascontiguousarray(found)
    if (found != middle).any():
        raise fail(
            zero.path, f"tensor {zero.name!r} has zero points, and the config says symmetric"
        )
    return middle
