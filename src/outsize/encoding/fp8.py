"""FP8 as published checkpoints have it: w = scale * code, codes floats of 8 bits (E4M3), 128 inputs a scale.

Scales are fp32 and of a row each, so that a scale for a whole tensor, a row, or a block of 128 x 128 weights
is kept as it is, and rows may be reordered: 8.25 bits a weight. torch has no kernel for them: all are
decoded, row by row where rows must not depend on each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from outsize.encoding.frozen import frozen
from outsize.encoding.plain import Encoding, Fields, FieldSpec, Inputs, check_cut, taken
from outsize.kernels.backend import Product
from outsize.kernels.layouts import CodedMatrix
from outsize.kernels.plain import by_rows, wide_linear

GROUP = 128
TYPE = torch.float8_e4m3fn
MOST = 448.0  # the largest number of the type
NUMBERS = torch.arange(256, dtype=torch.uint8, device="cpu").view(TYPE).float()  # of each code
AT_ONCE = 1 << 20  # weights that are decoded together


@dataclass(frozen=True, slots=True)
class Fp8:
    name: str = "fp8"
    tolerance: float = 2e-2

    def specs(self, num_rows: int, width: int) -> dict[str, FieldSpec]:
        return {
            "codes": FieldSpec(torch.uint8, (num_rows, width), 0),
            "scale": FieldSpec(torch.float32, (num_rows, -(-width // GROUP)), 0),
        }

    def stored_rows(self, fields: Fields) -> int:
        return fields["scale"].shape[0]

    def encode(self, w_NK: Tensor) -> dict[str, Tensor]:
        missing = -w_NK.shape[1] % GROUP
        groups = torch.nn.functional.pad(w_NK.float(), (0, missing)).unflatten(1, (-1, GROUP))
        scale_NG = groups.abs().amax(dim=2) / MOST
        safe = scale_NG.clamp_min(torch.finfo(torch.float32).tiny)[:, :, None]
        codes = (groups / safe).clamp_(-MOST, MOST).to(TYPE).flatten(1)
        return self.from_codes(codes.view(torch.uint8)[:, : w_NK.shape[1]], scale_NG)

    def from_codes(self, code_NK: Tensor, scale_NG: Tensor) -> dict[str, Tensor]:
        """Fields that keep every code and scale."""
        return {"codes": code_NK.contiguous(), "scale": scale_NG.contiguous()}

    def decode(self, fields: Fields) -> Tensor:
        return _decode(fields["codes"], fields["scale"])

    def product(self, fields: Fields) -> Product:
        return frozen(partial(_product, fields), partial(self.decode, fields))

    def linear(self, x_TK: Tensor, fields: Fields, wide: bool) -> Tensor:
        return self.product(fields)(x_TK, wide)

    def rows(self, fields: Fields, ids_T: Tensor) -> Tensor:
        return self.decode({name: field[ids_T] for name, field in fields.items()})

    def coded(self, fields: Fields) -> CodedMatrix | None:
        return None

    def step(self, width: int) -> tuple[int, int]:
        return 1, GROUP

    def take(self, fields: Fields, rows_N: Tensor | None, inputs: Inputs) -> dict[str, Tensor]:
        check_cut(self.name, inputs, GROUP, fields["codes"].shape[1])
        scale = taken(fields["scale"], rows_N, inputs, GROUP)
        return {"codes": taken(fields["codes"], rows_N, inputs), "scale": scale}


def _product(fields: Fields, x_TK: Tensor, wide: bool) -> Tensor:
    codes, scale = fields["codes"], fields["scale"]
    if wide:
        return wide_linear(
            x_TK, len(codes), lambda a, b: _decode(codes[a:b], scale[a:b]).to(x_TK.dtype)
        )
    step = _rows_at_once(codes)
    parts = zip(codes.split(step), scale.split(step), strict=True)
    return torch.cat([by_rows(x_TK, _decode(c, s), wide) for c, s in parts], dim=1)


def _rows_at_once(codes: Tensor) -> int:
    """Rows whose numbers stay in the cache until they are read again."""
    return max(1, AT_ONCE // codes.shape[1])


def _decode(codes: Tensor, scale_NG: Tensor) -> Tensor:
    """(N, K) fp32."""
    out, step = codes.new_empty(codes.shape, dtype=torch.float32), _rows_at_once(codes)
    for some, scale, to in zip(*(t.split(step) for t in (codes, scale_NG, out)), strict=True):
        torch.index_select(NUMBERS, 0, some.flatten().int(), out=to.view(-1))
        if to.shape[1] % GROUP == 0:
            to.unflatten(1, (-1, GROUP)).mul_(scale[:, :, None])
        else:
            to.mul_(scale.repeat_interleave(GROUP, dim=1)[:, : to.shape[1]])
    return out


ENCODINGS: tuple[Encoding, ...] = (Fp8(),)
