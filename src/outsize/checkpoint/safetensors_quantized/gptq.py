"""GPTQ, as AutoGPTQ and GPTQModel store it: integers of 4 or 8 bits with a step and a zero point a group.

    qweight (K / 8, N) int32, inputs packed; qzeros (G, N / 8) int32, outputs packed; scales (G, N)
    g_idx (K,) int32, perhaps: the group of each input

Lowest bits first, in order (of 8 bits, 4 in an int32). A zero point is stored less 1, in format "gptq_v2" as
it is. Stored as the highest code, it would be 16: AutoGPTQ reads it as 0, exllama's kernels as 16, GPTQModel
carries it into the next one; so it is refused. Source: QuantLinear of https://github.com/AutoGPTQ/AutoGPTQ,
https://github.com/ModelCloud/GPTQModel. Shapes: N rows (outputs), K inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from outsize.checkpoint.checkpoint import Joined, Tensor
from outsize.checkpoint.coded import Bytes
from outsize.checkpoint.ggml import BlockType
from outsize.checkpoint.read_json import fail
from outsize.checkpoint.safetensors_quantized import integers, stored
from outsize.checkpoint.safetensors_quantized.integers import Integers
from outsize.checkpoint.safetensors_quantized.scheme import Scheme
from outsize.checkpoint.safetensors_quantized.stored import Array, Span
from outsize.errors import UnsupportedError

PARTS = ("qweight", "qzeros", "scales")
GROUPS = "g_idx"


def join(name: str, parts: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """The matrix of these stored tensors, nothing read. Raises CheckpointError."""
    codes, scales, bits = parts["qweight"], parts["scales"], scheme.bits
    pack = 32 // bits
    stored.require_matrix(codes, ("I32",))
    width, count = codes.shape[0] * pack, codes.shape[1]
    group = scheme.group if scheme.group > 0 else width
    groups = -(-width // group)
    stored.require(scales, stored.FLOATS, (groups, count))
    stored.require(parts["qzeros"], ("I32",), (groups, -(-count // pack)))
    if GROUPS in parts:
        stored.require(parts[GROUPS], ("I32",), (width,))
    kind = integers.encoding_of(bits, group, width, stored.half_of(scales), not scheme.symmetric)
    joined = Joined(parts, lambda p, a, b: _read(p, scheme, group, Span(a, b)), 0, count)
    size = sum(t.size for t in parts.values())
    block = BlockType(kind, 1, 1)
    return Tensor(name, block, (count, width), codes.path, codes.offset, size, joined=joined)


def _read(parts: Mapping[str, Tensor], scheme: Scheme, group: int, span: Span) -> Integers:
    if GROUPS in parts:
        refuse_reordered(parts[GROUPS], group)
    bits, scales = scheme.bits, parts["scales"]
    words = stored.columns(parts["qweight"], span)
    codes = np.ascontiguousarray(unpacked(words.T, bits))
    step = stored.floats(scales, stored.columns(scales, span)).T
    zeros = _zeros(parts["qzeros"], scheme, span)
    return Integers(bits, group, stored.half_of(scales), codes, np.ascontiguousarray(step), zeros)


def _zeros(tensor: Tensor, scheme: Scheme, span: Span) -> int | Bytes:
    """(N, G), or the one that all symmetric groups have. Raises UnsupportedError."""
    pack, top, middle = 32 // scheme.bits, (1 << scheme.bits) - 1, 1 << (scheme.bits - 1)
    words = Span(span.start // pack, -(-span.stop // pack))
    packed = stored.columns(tensor, words)
    zeros = unpacked(packed, scheme.bits).T[span.start - words.start * pack :][: len(span)]
    if scheme.symmetric and (zeros == middle).all():
        return middle  # as gptq_v2 stores it, which some files call gptq
    if scheme.zero_shift:
        if (zeros == top).any():
            raise UnsupportedError(
                f"{tensor.path.name}: tensor {tensor.name!r} stores a zero point of {top}, which programs "
                f"read as {top + 1} or as 0; use a checkpoint of format gptq_v2, a symmetric one, or a GGUF"
            )
        zeros = zeros + np.uint8(scheme.zero_shift)
    if not scheme.symmetric:
        return np.ascontiguousarray(zeros)
    if (zeros != middle).any():
        raise UnsupportedError(
            f"{tensor.path.name}: tensor {tensor.name!r} has a zero point of {zeros[zeros != middle][0]}, "
            f"and the config says that it is symmetric, which is {middle} for all; use a GGUF of the model"
        )
    return middle


def refuse_reordered(tensor: Tensor, group: int) -> None:
    """Raises UnsupportedError, CheckpointError unless each group has inputs that lie side by side."""
    found, width = stored.whole(tensor), tensor.shape[0]
    if np.array_equal(found, np.arange(width) // group):
        return
    if found.min() < 0 or found.max() > (width - 1) // group:
        least, most = int(found.min()), int(found.max())
        raise fail(tensor.path, f"tensor {tensor.name!r} names groups {least:,} to {most:,} of "
                   f"{-(-width // group):,}")  # fmt: skip
    raise reordered(f"{tensor.path.name}: tensor {tensor.name!r}")


def reordered(where: str) -> UnsupportedError:
    """What to say of groups of inputs that do not lie side by side."""
    return UnsupportedError(
        f"{where} is quantized in the order of activations (desc_act, act-order), which outsize does not "
        "run; use a version without it, or a GGUF of the model"
    )


def unpacked(words: Array, bits: int) -> Bytes:
    """(R, W) words -> (R, W * 32 / bits) numbers."""
    if bits == 4:
        return stored.nibbles(words)
    return np.ascontiguousarray(words).view(np.uint8)
