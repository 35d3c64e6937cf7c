"""Groups of 32 weights with an fp16 scale each: w = scale * (code - offset), codes of 4, 5 or 8 bits.

These are the GGUF types Q4_0, Q5_0 and Q8_0, code for code and scale for scale; other types of more than four
bits are re-encoded as group8, which is finer than one scale a row. torch has no kernel for them, so
they are packed only where ours (kernels/csrc/groups.c) can be compiled; the plain twin, much slower, runs
anywhere.

Layout: blocks of 64 weights, groups A and B. group4: 32 bytes a block, low nibbles A, high nibbles B.
group5: likewise, and the fifth bits of the 64 apart. group8: a byte a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from outsize.encoding.frozen import frozen_linear
from outsize.encoding.plain import Encoding, Fields, FieldSpec, by_rows, wide_linear
from outsize.errors import UnsupportedError
from outsize.kernels.native import Kernels
from outsize.kernels.structs import GroupMatrix, NativeMatrix

GROUP, BLOCK = 32, 64
NARROW_ROWS = 16  # beyond, with fast bf16, decoding every weight once and one matmul are faster


@dataclass(frozen=True, slots=True)
class Group:
    """`kernels` None: the plain twin."""

    bits: int
    kernels: Kernels | None = None
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
        codes = fields["codes"]
        if self.bits < 8:
            blocks = codes.view(len(codes), -1, 1, GROUP)
            codes = torch.cat([blocks & 15, blocks >> 4], dim=2).flatten(1)
        if self.bits == 5:
            shifts = torch.arange(8, dtype=torch.uint8, device="cpu")
            codes = codes | (((fields["high"][:, :, None] >> shifts) & 1) << 4).flatten(1)
        grouped = codes.float().view(len(codes), -1, GROUP) - self.offset
        return (grouped * fields["scale"].float()[:, :, None]).flatten(1)

    def linear(self, x_TK: Tensor, fields: Fields, wide: bool) -> Tensor:
        if x_TK.requires_grad:
            return frozen_linear(
                x_TK, lambda x: self._run(x, fields, wide), lambda: self.decode(fields)
            )
        return self._run(x_TK, fields, wide)

    def _run(self, x_TK: Tensor, fields: Fields, wide: bool) -> Tensor:
        kernels = self.kernels
        if kernels is None:
            return by_rows(x_TK, self.decode(fields), wide)
        if wide and len(x_TK) > NARROW_ROWS and kernels.multiplies_bf16:

            def part(start: int, stop: int) -> Tensor:
                return kernels.group_decode(self._matrix(fields, start, stop)).to(x_TK.dtype)

            return wide_linear(x_TK, len(fields["scale"]), part)
        return kernels.group_linear(self._matrix(fields), x_TK)

    def _matrix(self, fields: Fields, start: int = 0, stop: int | None = None) -> GroupMatrix:
        """Some rows, or all, as the kernels want them."""
        rows, high = slice(start, stop), fields.get("high")
        if start == 0 and stop is None:
            return GroupMatrix(self.bits, fields["codes"], high, fields["scale"])
        part = None if high is None else high[rows]
        return GroupMatrix(self.bits, fields["codes"][rows], part, fields["scale"][rows])

    def rows(self, fields: Fields, ids_T: Tensor) -> Tensor:
        return self.decode({name: field[ids_T] for name, field in fields.items()})

    def native(self, fields: Fields) -> NativeMatrix | None:
        if self.kernels is None:
            return None
        codes, scale = fields["codes"], fields["scale"]
        rows, groups = scale.shape
        return NativeMatrix(self.bits, rows, groups * GROUP, codes, fields.get("high"), scale)


ENCODINGS: tuple[Encoding, ...] = (Group(4), Group(5), Group(8))
