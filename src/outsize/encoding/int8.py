"""int8 with one scale a row: w = scale * code, codes in -127..127 (of a published checkpoint: in -128..127).

The scale is rounded to bf16 (the kernel's type) before the codes are chosen, so rounding it costs
nothing. Narrow: `_weight_int8pack_mm`, row-invariant. Wide: codes are exact in bf16, so the matmul
runs on them as they are and its output is scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from outsize.encoding.frozen import frozen
from outsize.encoding.plain import Encoding, Fields, FieldSpec, Inputs, taken
from outsize.kernels.backend import Product
from outsize.kernels.plain import wide_linear
from outsize.kernels.structs import Coded

NARROW_ROWS = 48  # up to here the kernel beats decoding every weight, even for one long span
ROW_STEP = 16  # the kernel's blocks of rows; a last partial one is padded with zero rows


@dataclass(frozen=True, slots=True)
class Int8:
    name: str = "int8"
    tolerance: float = 2e-2

    def specs(self, num_rows: int, width: int) -> dict[str, FieldSpec]:
        padded = -(-num_rows // ROW_STEP) * ROW_STEP
        return {
            "codes": FieldSpec(torch.int8, (padded, width), 0),
            "scale": FieldSpec(torch.bfloat16, (padded,), 0),
        }

    def stored_rows(self, fields: Fields) -> int:
        return fields["scale"].shape[0]

    def encode(self, w_NK: Tensor) -> dict[str, Tensor]:
        w_NK = _pad_rows(w_NK.float(), ROW_STEP)
        scale_N = (w_NK.abs().amax(dim=1) / 127).to(torch.bfloat16)
        step_N1 = scale_N.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        codes = (w_NK / step_N1).round_().clamp_(-127, 127).to(torch.int8)
        return {"codes": codes, "scale": scale_N}

    def from_codes(self, code_NK: Tensor, step_N1: Tensor) -> dict[str, Tensor]:
        """Fields that keep every code (-128 is one, too) and step, which bf16 must hold."""
        scale_N = _pad_rows(step_N1, ROW_STEP)[:, 0].to(torch.bfloat16)
        return {"codes": _pad_rows(code_NK, ROW_STEP), "scale": scale_N}

    def decode(self, fields: Fields) -> Tensor:
        return fields["codes"].float() * fields["scale"].float()[:, None]

    def product(self, fields: Fields) -> Product:
        return frozen(partial(_product, fields), partial(self.decode, fields))

    def linear(self, x_TK: Tensor, fields: Fields, wide: bool) -> Tensor:
        return self.product(fields)(x_TK, wide)

    def rows(self, fields: Fields, ids_T: Tensor) -> Tensor:
        return fields["codes"][ids_T].float() * fields["scale"][ids_T].float()[:, None]

    def coded(self, fields: Fields) -> Coded | None:
        return None

    def step(self, width: int) -> tuple[int, int]:
        return 1, 1

    def take(self, fields: Fields, rows_N: Tensor | None, inputs: Inputs) -> dict[str, Tensor]:
        codes = _pad_rows(taken(fields["codes"], rows_N, inputs), ROW_STEP)
        scale_N1 = taken(fields["scale"][:, None], rows_N, None)
        return {"codes": codes, "scale": _pad_rows(scale_N1, ROW_STEP)[:, 0].contiguous()}


def _product(fields: Fields, x_TK: Tensor, wide: bool) -> Tensor:
    codes, scale = fields["codes"], fields["scale"]
    if wide and len(x_TK) > NARROW_ROWS:
        product = wide_linear(x_TK, len(codes), lambda a, b: codes[a:b].to(x_TK.dtype))
        return product.mul_(scale)
    return torch._weight_int8pack_mm(x_TK, codes, scale)


def _pad_rows(w_NK: Tensor, step: int) -> Tensor:
    missing = -w_NK.shape[0] % step
    return torch.nn.functional.pad(w_NK, (0, 0, 0, missing)) if missing else w_NK


ENCODINGS: tuple[Encoding, ...] = (Int8(),)
