"""What is written into a record: checkpoint tensors, how rows are reordered, the encoding that holds them."""

from __future__ import annotations

from dataclasses import dataclass

from outsize.checkpoint.checkpoint import Tensor
from outsize.pack.tables import TableHeader

LOSSY = ("Q2_K", "Q3_K")


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor that goes into a matrix, and how its rows must be reordered."""

    tensor: Tensor
    head_dim: int = 0  # > 0: heads in halves, to be interleaved
    shift: float = 0.0  # added to every number
    transposed: bool = False
    first: int = 0  # of its rows (of a vector: its numbers), every `step`th from this one on
    step: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, width) of what it gives; a vector is one row."""
        shape = self.tensor.shape
        if len(shape) == 1:
            return 1, len(range(self.first, shape[0], self.step))
        rows, width = shape[::-1] if self.transposed else shape
        return len(range(self.first, rows, self.step)), width


@dataclass(frozen=True, slots=True)
class Piece:
    """A matrix to be written, and what it is made of, stacked along rows."""

    encoding: str
    parts: tuple[Part, ...]

    @property
    def num_rows(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    @property
    def width(self) -> int:
        return self.parts[0].shape[1]


Record = dict[str, tuple[Piece, ...]]


@dataclass(frozen=True, slots=True)
class TablePlan:
    """A table to be written: its header without checksums, and each record's contents."""

    header: TableHeader
    records: tuple[Record, ...]
