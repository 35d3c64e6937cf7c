"""int4 in groups of 32: w = step * (code - 8) + zero, codes in 0..15.

The layout is the one that torch's AVX-512 kernel reads, `tile64`: rows in blocks of 64; in a block,
for each input, 32 bytes whose low nibbles are rows 0-31 and whose high nibbles are rows 32-63. A
matrix of the GGUF types Q4_0, Q4_1 and Q4_K keeps its codes; only step and zero are rounded to bf16.
Narrow: our kernel, or torch's where it reads this layout; row-invariant. Wide: the same where products of
bf16 are slow, else decode to bf16 once, then one matmul. The plain twin, much slower, runs anywhere.

Shapes: B blocks of 64 rows, G groups of 32 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from outsize.encoding.frozen import frozen_linear
from outsize.encoding.plain import Encoding, Fields, FieldSpec, by_rows, wide_linear
from outsize.errors import UnsupportedError
from outsize.kernels.native import Kernels
from outsize.kernels.structs import TILES, NativeMatrix

BLOCK, GROUP = 64, 32
NARROW_ROWS = 48  # up to here the kernel beats decoding every weight, even for one long span
LAYOUT = "tile64"
_INT4_MM = torch.ops.aten._weight_int4pack_mm_for_cpu.default


@cache
def supported() -> bool:
    """Does torch's kernel on this machine read our layout? Elsewhere it would misread every weight, and
    without our own only the plain twin is left."""
    codes = torch.arange(BLOCK * GROUP, dtype=torch.int32, device="cpu").view(BLOCK, GROUP) * 7 % 16
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return torch.equal(theirs.flatten(), _tile(codes.to(torch.uint8)).flatten())


@dataclass(frozen=True, slots=True)
class Int4:
    """`kernels` None: the plain way to decode."""

    kernels: Kernels | None = None
    name: str = "int4"
    tolerance: float = 2e-2

    def specs(self, num_rows: int, width: int) -> dict[str, FieldSpec]:
        if width % GROUP:
            raise UnsupportedError(
                f"int4 needs rows of a multiple of {GROUP} weights, not {width}; use int8"
            )
        padded = -(-num_rows // BLOCK) * BLOCK
        return {
            "packed": FieldSpec(torch.uint8, (padded // BLOCK, width, BLOCK // 2), 0),
            "scales": FieldSpec(torch.bfloat16, (width // GROUP, padded, 2), 1),
        }

    def stored_rows(self, fields: Fields) -> int:
        return fields["scales"].shape[1]

    def encode(self, w_NK: Tensor) -> dict[str, Tensor]:
        groups = w_NK.float().reshape(w_NK.shape[0], -1, GROUP)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        step = ((high - low) / 15).to(torch.bfloat16).float()
        zero = (low + 8 * step).to(torch.bfloat16).float()
        safe = step.clamp_min(torch.finfo(torch.float32).tiny)[:, :, None]
        codes = ((groups - zero[:, :, None]) / safe + 8).round_().clamp_(0, 15)
        return self.from_codes(codes.to(torch.uint8).reshape(w_NK.shape), step, zero - 8 * step)

    def from_codes(self, code_NK: Tensor, step_NG: Tensor, low_NG: Tensor) -> dict[str, Tensor]:
        """Fields for w = step * code + low, keeping every code. Rows are padded with zeros."""
        num_rows, width = code_NK.shape
        specs = self.specs(num_rows, width)
        padded = specs["scales"].shape[1]
        codes = torch.full((padded, width), 8, dtype=torch.uint8, device="cpu")
        codes[:num_rows] = code_NK
        scales = torch.zeros(padded, width // GROUP, 2, dtype=torch.float32, device="cpu")
        scales[:num_rows, :, 0] = step_NG
        scales[:num_rows, :, 1] = low_NG + 8 * step_NG
        return {
            "packed": _tile(codes),
            "scales": scales.to(torch.bfloat16).transpose(0, 1).contiguous(),
        }

    def decode(self, fields: Fields) -> Tensor:
        return _decode_KN(fields, torch.float32).T

    def linear(self, x_TK: Tensor, fields: Fields, wide: bool) -> Tensor:
        if x_TK.requires_grad:
            return frozen_linear(
                x_TK, lambda x: self._run(x, fields, wide), lambda: self.decode(fields)
            )
        return self._run(x_TK, fields, wide)

    def _run(self, x_TK: Tensor, fields: Fields, wide: bool) -> Tensor:
        scales = fields["scales"]
        kernels = self.kernels if x_TK.dtype == torch.bfloat16 else None
        if wide and len(x_TK) > NARROW_ROWS and (kernels is None or kernels.multiplies_bf16):
            dtype = x_TK.dtype
            return wide_linear(x_TK, scales.shape[1], lambda a, b: self._part(fields, dtype, a, b))
        if kernels is not None:
            return kernels.tile_linear(fields["packed"], scales, x_TK)
        if not supported():
            return by_rows(x_TK, self.decode(fields), wide)
        packed = fields["packed"].view(scales.shape[1], -1)
        out: Tensor = _INT4_MM(x_TK, packed, GROUP, scales)
        return out

    def _part(self, fields: Fields, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        """(n, K): some rows, decoded."""
        packed, scales = fields["packed"], fields["scales"]
        if self.kernels is not None and dtype == torch.bfloat16:
            return self.kernels.tile_decode(packed, scales, start, stop - start).T
        blocks = slice(start // BLOCK, stop // BLOCK)
        return _decode_KN({"packed": packed[blocks], "scales": scales[:, start:stop]}, dtype).T

    def rows(self, fields: Fields, ids_T: Tensor) -> Tensor:
        lane_T = ids_T % BLOCK
        bytes_TK = fields["packed"][ids_T // BLOCK, :, lane_T % 32]
        codes_TK = (bytes_TK >> (lane_T // 32 * 4)[:, None].to(torch.uint8)) & 15
        step_TG, zero_TG = fields["scales"][:, ids_T].float().permute(2, 1, 0).unbind(0)
        grouped = codes_TK.float().view(len(ids_T), -1, GROUP) - 8
        return (grouped * step_TG[:, :, None] + zero_TG[:, :, None]).flatten(1)

    def native(self, fields: Fields) -> NativeMatrix | None:
        if self.kernels is None:
            return None
        packed, scales = fields["packed"], fields["scales"]
        return NativeMatrix(TILES, scales.shape[1], packed.shape[1], packed, None, scales)


def _tile(code_NK: Tensor) -> Tensor:
    """(N, K) codes -> (B, K, 32) bytes."""
    blocks = code_NK.view(-1, 2, BLOCK // 2, code_NK.shape[1])
    return (blocks[:, 0] | blocks[:, 1] << 4).transpose(1, 2).contiguous()


def _decode_KN(fields: Fields, dtype: torch.dtype) -> Tensor:
    """(K, N) numbers. Flipping each nibble's top bit makes it a signed code - 8."""
    packed, scales = fields["packed"], fields["scales"]
    signed_KBb = (packed ^ 0x88).view(torch.int8).transpose(0, 1)
    num_inputs, num_blocks, half = signed_KBb.shape
    codes = torch.empty(num_inputs, num_blocks, BLOCK, dtype=dtype, device="cpu")
    codes[:, :, :half] = (signed_KBb << 4) >> 4
    codes[:, :, half:] = signed_KBb >> 4
    step, zero = scales.to(dtype).unbind(2)
    grouped = codes.view(-1, GROUP, num_blocks * BLOCK)
    return torch.addcmul(zero[:, None], grouped, step[:, None]).view(num_inputs, -1)


ENCODINGS: tuple[Encoding, ...] = (Int4(),)
