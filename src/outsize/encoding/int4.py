"""int4 in groups of 32: w = step * (code - 8) + zero, codes in 0..15.

The layout is `tile64` (kernels/layouts.py), the one that torch's AVX-512 kernel reads. A matrix of the GGUF
types Q4_0, Q4_1 and Q4_K keeps its codes; only step and zero are rounded to bf16. Narrow: our kernel, or
torch's where it reads this layout; row-invariant. Wide: the same where products of bf16 are slow, else decode
to bf16 once, then one matmul. Without any kernel, decoding, much slower, runs anywhere.

Shapes: B blocks of 64 rows, G groups of 32 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from outsize.encoding.frozen import frozen
from outsize.encoding.plain import Encoding, Fields, FieldSpec, Inputs, check_cut, taken
from outsize.errors import UnsupportedError
from outsize.kernels.backend import Backend, Product
from outsize.kernels.layouts import BLOCK, GROUP, TILES, CodedMatrix, decode_tiles, tile, untile
from outsize.kernels.plain import PLAIN

LAYOUT = "tile64"


@dataclass(frozen=True, slots=True)
class Int4:
    """`backend`: what computes with the codes."""

    backend: Backend = PLAIN
    name: str = "int4"
    tolerance: float = 2e-2

    def specs(self, num_rows: int, width: int) -> dict[str, FieldSpec]:
        if width % GROUP:
            raise UnsupportedError(
                f"int4 needs rows of a multiple of {GROUP} weights, not {width}; use int8"
            )
        padded = -(-num_rows // BLOCK) * BLOCK
        return {
            "packed": FieldSpec(torch.uint8, (padded // BLOCK, width, BLOCK // 2), 0, BLOCK),
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
            "packed": tile(codes),
            "scales": scales.to(torch.bfloat16).transpose(0, 1).contiguous(),
        }

    def decode(self, fields: Fields) -> Tensor:
        return decode_tiles(fields["packed"], fields["scales"], torch.float32).T

    def product(self, fields: Fields) -> Product:
        return frozen(self.backend.product(self.coded(fields)), partial(self.decode, fields))

    def linear(self, x_TK: Tensor, fields: Fields, wide: bool) -> Tensor:
        return self.product(fields)(x_TK, wide)

    def rows(self, fields: Fields, ids_T: Tensor) -> Tensor:
        lane_T = ids_T % BLOCK
        bytes_TK = fields["packed"][ids_T // BLOCK, :, lane_T % 32]
        codes_TK = (bytes_TK >> (lane_T // 32 * 4)[:, None].to(torch.uint8)) & 15
        step_TG, zero_TG = fields["scales"][:, ids_T].float().permute(2, 1, 0).unbind(0)
        grouped = codes_TK.float().view(len(ids_T), -1, GROUP) - 8
        return (grouped * step_TG[:, :, None] + zero_TG[:, :, None]).flatten(1)

    def coded(self, fields: Fields) -> CodedMatrix:
        packed, scales = fields["packed"], fields["scales"]
        return CodedMatrix(TILES, scales.shape[1], packed.shape[1], packed, None, scales)

    def step(self, width: int) -> tuple[int, int]:
        return 1, GROUP

    def take(self, fields: Fields, rows_N: Tensor | None, inputs: Inputs) -> dict[str, Tensor]:
        check_cut(self.name, inputs, GROUP, fields["packed"].shape[1])
        codes = taken(untile(fields["packed"]), rows_N, inputs)
        scales_NG2 = taken(fields["scales"].transpose(0, 1), rows_N, inputs, GROUP)
        missing = -len(codes) % BLOCK
        codes = torch.nn.functional.pad(codes, (0, 0, 0, missing), value=8)
        scales_NG2 = torch.nn.functional.pad(scales_NG2, (0, 0, 0, 0, 0, missing))
        return {"packed": tile(codes), "scales": scales_NG2.transpose(0, 1).contiguous()}


ENCODINGS: tuple[Encoding, ...] = (Int4(),)
