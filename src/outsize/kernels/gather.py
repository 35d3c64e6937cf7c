"""A stored field of some records put where a matrix has it: by torch, which first makes a copy of its own,
and by csrc/chunks.c, piece by piece.

Shapes: S records of B bytes, n of which are meant.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from outsize.kernels.structs import address

_P, _L = ctypes.c_void_p, ctypes.c_long


class Pieces(NamedTuple):
    """A field in a record: from byte `offset` on, `number` pieces of `size` bytes."""

    offset: int
    number: int
    size: int


def gather(records_SB: Tensor, places_n: Tensor, pieces: Pieces, to: Tensor, at_n: Tensor) -> None:
    """Fill in the field of the records at these places. `to`: the matrix's field as bytes (pieces, all of
    each), in which a record's pieces come at the at-th place."""
    offset, count, size = pieces
    some = records_SB[:, offset : offset + count * size].index_select(0, places_n)
    to.view(count, -1, size)[:, at_n] = some.view(-1, count, size).movedim(0, 1)


class NativeGather:
    """`gather_pieces` of the C files."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library["gather_pieces"]
        self._run.argtypes, self._run.restype = [_P, _L, _P, _P, _L, _P, _L, _L, _L], None

    def __call__(
        self, records_SB: Tensor, places_n: Tensor, pieces: Pieces, to: Tensor, at_n: Tensor
    ) -> None:
        records = address(records_SB, torch.uint8) + pieces.offset
        places, at = address(places_n, torch.int64), address(at_n, torch.int64)
        self._run(
            records, records_SB.shape[1], places, at, len(at_n), address(to, torch.uint8),
            pieces.number, pieces.size, to.shape[1],
        )  # fmt: skip
