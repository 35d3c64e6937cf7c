"""FP4 (E2M1) as compressed-tensors stores it: two weights a byte, the first in the low bits.

    nvfp4: weight_packed (N, K / 2), weight_scale (N, K / 16) E4M3, weight_global_scale one fp32:
           w = number of code * (scale / global scale)
    mxfp4: weight_packed (N, K / 2), weight_scale (N, K / 32) bytes, two to the power of the byte less 127

Source: NVFP4PackedCompressor and MXFP4PackedCompressor of https://github.com/vllm-project/compressed-tensors.
Shapes: N rows, K inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from outsize.checkpoint.checkpoint import Joined, Tensor
from outsize.checkpoint.coded import Bytes, Coded, Floats
from outsize.checkpoint.ggml import BlockType, Codes
from outsize.checkpoint.read_json import fail
from outsize.checkpoint.safetensors_quantized import stored
from outsize.checkpoint.safetensors_quantized.scheme import Weights
from outsize.checkpoint.safetensors_quantized.stored import Span
from outsize.kernels.palettes import FORMS

GLOBAL = "weight_global_scale"
_LEVELS = np.array((0, 0.5, 1, 1.5, 2, 3, 4, 6), np.float32)
LEVELS = np.concatenate([_LEVELS, -_LEVELS])


@dataclass(frozen=True, slots=True)
class Float4:
    """A matrix, or some of its rows. `divisor`: the global scale of nvfp4."""

    code_NK: Bytes
    scale_NG: Floats
    divisor: np.float32 | None = None

    def floats(self) -> Floats:
        """fp32, as compressed-tensors does it: the scales are divided first."""
        group = self.code_NK.shape[1] // self.scale_NG.shape[1]
        with np.errstate(all="ignore"):  # foreign scales may be anything
            scale = self.scale_NG if self.divisor is None else self.scale_NG / self.divisor
        out = LEVELS[self.code_NK]
        stored.each_group(np.multiply, out, scale, group)
        return out

    def coded(self) -> Coded | None:
        """Both types have a form of their own. The divisor of nvfp4 becomes a factor of each row, as it is
        in NVIDIA's definition and in kernels for it: where it is no power of two, that rounds in another
        place than `floats` does, by 2 in the last of an fp32's 24 bits at most."""
        if self.divisor is None:
            return Coded("mxfp4", self.code_NK, self.scale_NG * np.float32(0.5))
        with np.errstate(all="ignore"):
            factor = np.float32(1) / self.divisor
        outer = np.full(len(self.code_NK), factor, np.float32)
        return Coded("nvfp4", self.code_NK, self.scale_NG, outer_N=outer)

    def codes(self, encoding: str) -> Codes | None:
        return None


def join(name: str, parts: Mapping[str, Tensor], weights: Weights) -> Tensor:
    """The matrix of these stored tensors, nothing read. Raises CheckpointError."""
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    stored.require_matrix(packed, ("U8",))
    rows, width = packed.shape[0], 2 * packed.shape[1]
    form = "nvfp4" if weights.strategy == "tensor_group" else "mxfp4"
    kinds = ("F8_E4M3",) if form == "nvfp4" else ("U8", "F8_E8M0")
    group = FORMS[form].group
    if width % group:
        raise fail(
            packed.path, f"tensor {packed.name!r} has {width:,} inputs, no groups of {group}"
        )
    stored.require(scale, kinds, (rows, width // group))
    kept = {"weight_packed": packed, "weight_scale": scale}
    if form == "nvfp4":
        stored.require(parts[GLOBAL], ("F32",), (1,), ())
        kept[GLOBAL] = parts[GLOBAL]
    joined = Joined(kept, lambda p, a, b: _read(p, Span(a, b)), 0, rows)
    size = sum(t.size for t in kept.values())
    return Tensor(
        name, BlockType(form, 1, 1), (rows, width), packed.path, packed.offset, size, joined=joined
    )


def _read(parts: Mapping[str, Tensor], span: Span) -> Float4:
    packed = stored.rows(parts["weight_packed"], span)
    scale = parts["weight_scale"]
    found = stored.rows(scale, span)
    divisor = None
    if GLOBAL in parts:
        found = stored.floats(scale, found)
        divisor = stored.floats(parts[GLOBAL], stored.whole(parts[GLOBAL])).reshape(-1)[0]
    else:
        found = stored.E8M0[found]
    return Float4(stored.nibbles(packed), found, divisor)
