"""AWQ, as AutoAWQ stores it ("gemm"): integers of 4 bits with a zero point and an fp16 step a group.

    qweight (K, N / 8) int32, qzeros (G, N / 8) int32, scales (G, N): all transposed, outputs packed

An int32 holds 8 outputs, the lowest bits first, in the order 0, 2, 4, 6, 1, 3, 5, 7. Source: dequantize_gemm
of https://github.com/casper-hansen/AutoAWQ. Shapes: N rows (outputs), K inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from outsize.checkpoint.checkpoint import Joined, Tensor
from outsize.checkpoint.coded import Bytes
from outsize.checkpoint.ggml import BlockType
from outsize.checkpoint.safetensors_quantized import integers, stored
from outsize.checkpoint.safetensors_quantized.integers import Integers
from outsize.checkpoint.safetensors_quantized.scheme import Scheme
from outsize.checkpoint.safetensors_quantized.stored import Array, Span

PARTS = ("qweight", "qzeros", "scales")
PACK = 8  # outputs in an int32
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of them is


def join(name: str, parts: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """The matrix of these stored tensors, nothing read. Raises CheckpointError."""
    codes, scales = parts["qweight"], parts["scales"]
    stored.require_matrix(codes, ("I32",))
    width, count = codes.shape[0], codes.shape[1] * PACK
    group = scheme.group if scheme.group > 0 else width
    groups = -(-width // group)
    stored.require(scales, stored.FLOATS, (groups, count))
    stored.require(parts["qzeros"], ("I32",), (groups, count // PACK))
    kind = integers.encoding_of(4, group, width, stored.half_of(scales), True)
    joined = Joined(parts, lambda p, a, b: _read(p, group, Span(a, b)), 0, count)
    block = BlockType(kind, 1, 1)
    size = sum(t.size for t in parts.values())
    return Tensor(name, block, (count, width), codes.path, codes.offset, size, joined=joined)


def _read(parts: Mapping[str, Tensor], group: int, span: Span) -> Integers:
    words = Span(span.start // PACK, -(-span.stop // PACK))
    cut = slice(span.start - words.start * PACK, span.stop - words.start * PACK)
    codes, zeros = (_unpacked(stored.columns(parts[k], words))[cut] for k in ("qweight", "qzeros"))
    scales = parts["scales"]
    step = stored.floats(scales, stored.columns(scales, span)).T
    return Integers(4, group, stored.half_of(scales), codes, np.ascontiguousarray(step), zeros)


def _unpacked(words: Array) -> Bytes:
    """(R, W) words -> (8 W, R) numbers."""
    turned = np.ascontiguousarray(words.T)
    out = np.empty((len(turned), PACK, len(words)), np.uint8)
    for i, position in enumerate(ORDER):
        out[:, i] = turned >> 4 * position & 15
    return out.reshape(-1, len(words))
