"""Encodings: how stored fields become numbers. This file: the protocol, and floats as they are.

An encoding is chosen per matrix when a pack is written. `linear` has two ways to run: narrow (few
rows: the kernel reads each weight once, and a row's result does not depend on the other rows) and
wide (many rows: decode once, then one matmul). Only the caller knows which a row belongs to.

Shapes: T rows of x, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from outsize.errors import UnsupportedError
from outsize.kernels.backend import Product
from outsize.kernels.structs import Coded

Fields = Mapping[str, Tensor]
Inputs = tuple[slice, ...] | None  # runs of a matrix's inputs, in any order; None: all


class FieldSpec(NamedTuple):
    """One stored tensor of an encoded matrix."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    row_axis: int  # the axis that grows with N
    rows: int = 1  # of the matrix, for one step along it


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

    def product(self, fields: Fields) -> Product:
        """(x (T, K), wide) -> (T, N) in the type of x; differentiable in x. For a matrix that stays where it
        is: fields are checked here, once."""
        ...

    def linear(self, x_TK: Tensor, fields: Fields, wide: bool) -> Tensor:
        """The same, once."""
        ...

    def rows(self, fields: Fields, ids_T: Tensor) -> Tensor:
        """(T, K) fp32: some rows of the matrix, decoded."""
        ...

    def coded(self, fields: Fields) -> Coded | None:
        """For a backend that computes with its codes; None: torch does."""
        ...

    def step(self, width: int) -> tuple[int, int]:
        """(rows, inputs) of a matrix of this width that cuts must be at multiples of."""
        ...

    def take(self, fields: Fields, rows_N: Tensor | None, inputs: Inputs) -> dict[str, Tensor]:
        """The fields of some of its rows (whole steps of them, in any order) and of runs of its inputs;
        None: all. Codes are moved, never made anew: decoding them gives those numbers of the whole, bit for
        bit. Raises UnsupportedError for a cut within a step."""
        ...


def slice_rows(
    specs: Mapping[str, FieldSpec], fields: Fields, start: int, stop: int
) -> dict[str, Tensor]:
    """The fields of some rows of a matrix: views, no copy. Raises UnsupportedError where a stored block of
    rows would be cut."""
    out = {}
    for name, spec in specs.items():
        if start % spec.rows or stop % spec.rows:
            raise UnsupportedError(f"rows {start} to {stop} cut blocks of {spec.rows} rows")
        count = (stop - start) // spec.rows
        out[name] = fields[name].narrow(spec.row_axis, start // spec.rows, count)
    return out


def check_cut(name: str, inputs: Inputs, step: int, width: int) -> None:
    """Raise UnsupportedError for a run of inputs that cuts what shares a scale."""
    for run in inputs or ():
        if run.start % step or (run.stop % step and run.stop != width):
            raise UnsupportedError(
                f"inputs {run.start:,} to {run.stop:,} of a matrix in {name} cut what is stored together: "
                f"multiples of {step} are due"
            )


def taken(field: Tensor, rows_N: Tensor | None, inputs: Inputs, each: int = 1) -> Tensor:
    """Some rows of a field, and those of its columns that belong to some runs of inputs, `each` inputs a
    column."""
    found = field if rows_N is None else field[rows_N]
    if inputs is not None:
        runs = [found[:, run.start // each : -(-run.stop // each)] for run in inputs]
        found = runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)
    return found.contiguous()


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

    def product(self, fields: Fields) -> Product:
        w_NK = fields["w"]
        return lambda x_TK, wide: linear(x_TK, w_NK.to(x_TK.dtype))

    def linear(self, x_TK: Tensor, fields: Fields, wide: bool) -> Tensor:
        return self.product(fields)(x_TK, wide)

    def rows(self, fields: Fields, ids_T: Tensor) -> Tensor:
        return fields["w"][ids_T].float()

    def coded(self, fields: Fields) -> Coded | None:
        return None

    def step(self, width: int) -> tuple[int, int]:
        return 1, 1

    def take(self, fields: Fields, rows_N: Tensor | None, inputs: Inputs) -> dict[str, Tensor]:
        return {"w": taken(fields["w"], rows_N, inputs)}


ENCODINGS: tuple[Encoding, ...] = (
    Plain("bf16", torch.bfloat16, 2e-2),
    Plain("fp32", torch.float32, 1e-5),
)
