"""Encodings: how stored fields become numbers. This file: the protocol, and floats as they are.

An encoding is chosen per matrix when a pack is written. `linear` has two ways to run: narrow (few
rows: the kernel reads each weight once, and a row's result does not depend on the other rows) and
wide (many rows: decode once, then one matmul). Only the caller knows which a row belongs to.

Shapes: T rows of x, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from outsize.kernels.structs import NativeMatrix

Fields = Mapping[str, Tensor]
WIDE_BYTES = 8 << 20  # decoded at once: it stays in the cache until the matmul has read it


class FieldSpec(NamedTuple):
    """One stored tensor of an encoded matrix."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    row_axis: int  # the axis that grows with N


class Encoding(Protocol):
    """How a matrix w_NK is stored. Law: linear(x, f) == x @ decode(f).T within the tolerance."""

    @property
    def name(self) -> str: ...
    @property
    def tolerance(self) -> float:
        """Largest relative error of `linear` against decode, of the output's norm."""
        ...

    def specs(self, num_rows: int, width: int) -> dict[str, FieldSpec]:
        """The fields of an (N, K) matrix. Raises UnsupportedError for a shape it cannot hold."""
        ...

    def stored_rows(self, fields: Fields) -> int:
        """N with its padding."""
        ...

    def encode(self, w_NK: Tensor) -> dict[str, Tensor]: ...
    def decode(self, fields: Fields) -> Tensor:
        """(N, K) fp32; N may be padded with zero rows."""
        ...

    def linear(self, x_TK: Tensor, fields: Fields, wide: bool) -> Tensor:
        """(T, N) in the type of x. Differentiable in x."""
        ...

    def rows(self, fields: Fields, ids_T: Tensor) -> Tensor:
        """(T, K) fp32: some rows of the matrix, decoded."""
        ...

    def native(self, fields: Fields) -> NativeMatrix | None:
        """For kernels that run several matrices at once, with the bits of narrow `linear` in bf16."""
        ...


def wide_linear(x_TK: Tensor, num_rows: int, decode: Callable[[int, int], Tensor]) -> Tensor:
    """x @ w.T with `decode(start, stop)` giving rows of w (n, K) in the type of x, block by block, so
    that a large matrix is never whole in its decoded form. Blocks are multiples of 64 rows."""
    step = max(64, WIDE_BYTES // (x_TK.shape[1] * x_TK.element_size()) // 64 * 64)
    if num_rows <= step:
        return linear(x_TK, decode(0, num_rows))
    out_TN = x_TK.new_empty(len(x_TK), num_rows)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        out_TN[:, start:stop] = linear(x_TK, decode(start, stop))
    return out_TN


def by_rows(x_TK: Tensor, w_NK: Tensor, wide: bool) -> Tensor:
    """x @ w.T in fp32, in the type of x. Unless wide, row by row: then a row's bits are its own."""
    rows = [linear(x, w_NK) for x in x_TK.float().split(len(x_TK) if wide else 1)]
    return torch.cat(rows).to(x_TK.dtype)


@dataclass(frozen=True, slots=True)
class Plain:
    """Floats. Products of one row and of many differ in rounding, so rows are not invariant."""

    name: str
    dtype: torch.dtype
    tolerance: float

    def specs(self, num_rows: int, width: int) -> dict[str, FieldSpec]:
        return {"w": FieldSpec(self.dtype, (num_rows, width), 0)}

    def stored_rows(self, fields: Fields) -> int:
        return fields["w"].shape[0]

    def encode(self, w_NK: Tensor) -> dict[str, Tensor]:
        return {"w": w_NK.to(self.dtype)}

    def decode(self, fields: Fields) -> Tensor:
        return fields["w"].float()

    def linear(self, x_TK: Tensor, fields: Fields, wide: bool) -> Tensor:
        return linear(x_TK, fields["w"].to(x_TK.dtype))

    def rows(self, fields: Fields, ids_T: Tensor) -> Tensor:
        return fields["w"][ids_T].float()

    def native(self, fields: Fields) -> NativeMatrix | None:
        return None


ENCODINGS: tuple[Encoding, ...] = (
    Plain("bf16", torch.bfloat16, 2e-2),
    Plain("fp32", torch.float32, 1e-5),
)
