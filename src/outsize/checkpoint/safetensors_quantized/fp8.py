"""FP8 (E4M3): a byte a weight, and an fp32 scale for a tensor, a row or a block of 128 x 128 weights.

    weight (N, K) float8_e4m3fn; weight_scale_inv (DeepSeek, Qwen) or weight_scale (compressed-tensors,
    FBGEMM, AutoFP8): one number, (N, 1), or (N / 128, K / 128)

Both are what a weight is multiplied by. Source: weight_dequant of https://github.com/deepseek-ai/DeepSeek-V3,
NaiveQuantizationCompressor of https://github.com/vllm-project/compressed-tensors.
Shapes: N rows, K inputs, G groups of 128 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from outsize.checkpoint.checkpoint import Joined, Tensor
from outsize.checkpoint.coded import Bytes, Coded, Floats
from outsize.checkpoint.ggml import BlockType, Codes
from outsize.checkpoint.safetensors_quantized import stored
from outsize.checkpoint.safetensors_quantized.scheme import BLOCK, Weights
from outsize.checkpoint.safetensors_quantized.stored import Span

SCALES = (*stored.FLOATS, "F8_E8M0")
KIND = BlockType("fp8", 1, 1)  # named as the encoding that holds it exactly


@dataclass(frozen=True, slots=True)
class Float8:
    """A matrix, or some of its rows: w[n, k] = number of code[n, k] * scale[n, k / 128]."""

    code_NK: Bytes
    scale_NG: Floats

    def floats(self) -> Floats:
        """fp32; one rounding."""
        out = stored.E4M3[self.code_NK]
        stored.each_group(np.multiply, out, self.scale_NG, BLOCK)
        return out

    def coded(self) -> Coded | None:
        """No palette has 256 levels."""
        return None

    def codes(self, encoding: str) -> Codes | None:
        """Bytes and scales as they are, for the encoding of that name."""
        if encoding != KIND.name:
            return None
        return Codes(self.code_NK, self.scale_NG, self.scale_NG)


def shared_by(scale: Tensor, blocks: bool) -> Weights:
    """What shares a scale, where a config says no more than whether blocks do."""
    single = math.prod(scale.shape) == 1 and not blocks
    return Weights(8, True, "block" if blocks else "tensor" if single else "channel")


def join(name: str, weight: Tensor, scale: Tensor, shares: Weights) -> Tensor:
    """The matrix of a weight and its scale, nothing read. Raises CheckpointError."""
    stored.require_matrix(weight, ("F8_E4M3",))
    rows, width = weight.shape
    if shares.strategy == "block":
        stored.require(scale, SCALES, (-(-rows // BLOCK), -(-width // BLOCK)))
    elif shares.strategy == "group":
        stored.require(scale, SCALES, (rows, -(-width // shares.group)))
    elif shares.strategy == "channel":
        stored.require(scale, SCALES, (rows, 1), (rows,))
    else:
        stored.require(scale, SCALES, (), (1,), (1, 1))
    parts = {"weight": weight, "scale": scale}
    joined = Joined(parts, lambda p, a, b: _read(p, shares, Span(a, b)), 0, rows)
    size = weight.size + scale.size
    return Tensor(name, KIND, weight.shape, weight.path, weight.offset, size, joined=joined)


def _read(parts: Mapping[str, Tensor], shares: Weights, span: Span) -> Float8:
    codes = stored.rows(parts["weight"], span)
    return Float8(codes, _scales(parts["scale"], shares, span, codes.shape[1]))


def _scales(tensor: Tensor, shares: Weights, span: Span, width: int) -> Floats:
    """(N, G) of some rows, whatever shares one."""
    groups = -(-width // BLOCK)
    if shares.strategy == "block":
        blocks = Span(span.start // BLOCK, -(-span.stop // BLOCK))
        found = stored.floats(tensor, stored.rows(tensor, blocks))
        return found[np.arange(span.start, span.stop) // BLOCK - blocks.start]
    if shares.strategy == "group":
        found = stored.floats(tensor, stored.rows(tensor, span))
        return np.repeat(found, shares.group // BLOCK, axis=1)[:, :groups]
    if shares.strategy == "channel":
        found = stored.floats(tensor, stored.rows(tensor, span)).reshape(-1, 1)
        return np.repeat(found, groups, axis=1)
    one = stored.floats(tensor, stored.whole(tensor)).reshape(1, 1)
    return np.broadcast_to(one, (len(span), groups)).copy()
