"""Groups of 32 weights with an fp16 scale each: w = scale * (code - offset), codes of 4, 5 or 8 bits.

These are the GGUF types Q4_0, Q5_0 and Q8_0, code for code and scale for scale; other types of more than four
bits are re-encoded as group8, which is finer than one scale a row. torch has no kernel for them, so
they are packed only where ours (kernels/csrc/groups.c) can be compiled; the plain twin, much slower, runs
anywhere. kernels/layouts.py has the layout.
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
from outsize.kernels.layouts import BLOCK, GROUP, CodedMatrix, decode_groups
from outsize.kernels.plain import PLAIN


@dataclass(frozen=True, slots=True)
class Group:
    """`backend`: what computes with the codes."""

    bits: int
    backend: Backend = PLAIN
    tolerance: float = 2e-2

    @property
    def name(self) -> str:
        return f"group{self.bits}"

    @property
    def offset(self) -> int:
        return 1 << (self.bits - 1)

    def specs(self, num_rows: int, width: int) -> dict[str, FieldSpec]:
        if width % BLOCK:
            raise UnsupportedError(
                f"{self.name} needs rows of a multiple of {BLOCK} weights, not {width}; use int8"
            )
        scale = {"scale": FieldSpec(torch.float16, (num_rows, width // GROUP), 0)}
        if self.bits == 8:
            return {"codes": FieldSpec(torch.uint8, (num_rows, width), 0)} | scale
        codes = {"codes": FieldSpec(torch.uint8, (num_rows, width // 2), 0)}
        if self.bits == 5:
            codes["high"] = FieldSpec(torch.uint8, (num_rows, width // 8), 0)
        return codes | scale

    def stored_rows(self, fields: Fields) -> int:
        return fields["scale"].shape[0]

    def encode(self, w_NK: Tensor) -> dict[str, Tensor]:
        groups = w_NK.float().reshape(w_NK.shape[0], -1, GROUP)
        top = self.offset - 1
        step = (groups.abs().amax(dim=2) / top).to(torch.float16)
        safe = step.float().clamp_min(torch.finfo(torch.float32).tiny)[:, :, None]
        codes = (groups / safe).round_().clamp_(-top, top) + self.offset
        return self.from_codes(codes.to(torch.uint8).reshape(w_NK.shape), step)

    def from_codes(self, code_NK: Tensor, step_NG: Tensor) -> dict[str, Tensor]:
        """Fields for w = step * (code - offset), keeping every code and scale."""
        scale = step_NG.to(torch.float16)
        if self.bits == 8:
            return {"codes": code_NK.contiguous(), "scale": scale}
        a, b = code_NK.view(len(code_NK), -1, 2, GROUP).unbind(2)
        nibbles = (a & 15) | ((b & 15) << 4)
        if self.bits == 4:
            return {"codes": nibbles.flatten(1), "scale": scale}
        fifth = (code_NK >> 4).view(len(code_NK), -1, 8) << torch.arange(
            8, dtype=torch.uint8, device="cpu"
        )
        high = fifth.sum(dim=2, dtype=torch.uint8)
        return {"codes": nibbles.flatten(1), "high": high, "scale": scale}

    def decode(self, fields: Fields) -> Tensor:
        return decode_groups(self.bits, fields["codes"], fields.get("high"), fields["scale"])

    def product(self, fields: Fields) -> Product:
        return frozen(self.backend.product(self.coded(fields)), partial(self.decode, fields))

    def linear(self, x_TK: Tensor, fields: Fields, wide: bool) -> Tensor:
        return self.product(fields)(x_TK, wide)

    def rows(self, fields: Fields, ids_T: Tensor) -> Tensor:
        return self.decode({name: field[ids_T] for name, field in fields.items()})

    def coded(self, fields: Fields) -> CodedMatrix:
        codes, scale = fields["codes"], fields["scale"]
        rows, groups = scale.shape
        return CodedMatrix(self.bits, rows, groups * GROUP, codes, fields.get("high"), scale)

    def step(self, width: int) -> tuple[int, int]:
        return 1, BLOCK  # groups lie in pairs

    def take(self, fields: Fields, rows_N: Tensor | None, inputs: Inputs) -> dict[str, Tensor]:
        width = fields["scale"].shape[1] * GROUP
        check_cut(self.name, inputs, BLOCK, width)
        return {
            name: taken(field, rows_N, inputs, width // field.shape[1])
            for name, field in fields.items()
        }


ENCODINGS: tuple[Encoding, ...] = (Group(4), Group(5), Group(8))
