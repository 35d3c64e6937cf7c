"""Pieces of matrices out of records, put where a matrix has them: the plain twin of csrc/pieces.c, and that.

A record holds, `offset` bytes on, a field of some bundle: a block as the matrix's own field, but of `unit`
steps along an axis, instead of all. Shapes: S records of B bytes, n pieces."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_P, _L = ctypes.c_void_p, ctypes.c_long


class Piece(NamedTuple):
    """Where in a record a piece is, and along which axis of the matrix's field it has so many steps."""

    offset: int
    axis: int
    unit: int


def place(found: tuple[Tensor, Tensor], piece: Piece, out: Tensor, to: Sequence[int]) -> None:
    """`found`: records (S, B), of bytes, and which of them (n); `to`: where each goes, in units."""
    records, places = found
    to_N = torch.tensor(to, dtype=torch.int64, device="cpu")
    shape = (*out.shape[: piece.axis], piece.unit, *out.shape[piece.axis + 1 :])
    size = math.prod(shape) * out.dtype.itemsize
    some = records[:, piece.offset : piece.offset + size].index_select(0, places)
    some = some.view(out.dtype).view(len(places), *shape)
    units = out.unflatten(piece.axis, (-1, piece.unit))
    units.index_copy_(piece.axis, to_N, some.movedim(0, piece.axis))


class NativePieces:
    """`place_pieces` of the C files."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library["place_pieces"]
        self._run.argtypes, self._run.restype = [_P, _P, _P, _P, _L, _P], None

    def __call__(
        self, found: tuple[Tensor, Tensor], piece: Piece, out: Tensor, to: Sequence[int]
    ) -> None:
        (records, places), axis = found, piece.axis
        each = out.dtype.itemsize * math.prod(out.shape[axis + 1 :])  # bytes of a step
        before = math.prod(out.shape[:axis])
        step = out.stride(axis - 1) * out.dtype.itemsize if axis else 0
        form = (_L * 5)(records.stride(0), piece.offset, before, piece.unit * each, step)
        where = (_L * len(to))(*(i * piece.unit * each for i in to))
        self._run(records.data_ptr(), places.data_ptr(), out.data_ptr(), where, len(to), form)
