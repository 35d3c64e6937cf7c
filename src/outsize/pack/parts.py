"""What goes into a record: foreign tensors, how their rows are reordered, the encoding that holds them."""

from __future__ import annotations

from dataclasses import dataclass

from outsize.checkpoint.checkpoint import Tensor
from outsize.errors import UnsupportedError
from outsize.kernels.layouts import torch_reads_tiles
from outsize.pack.format import TableHeader

# With our kernels; of types of more bits, group8.
GROUPED = {
    "Q4_0": "group4",
    "Q5_0": "group5",
    "MXFP4": "group5",
}
CODED = {"Q4_0": "int4", "Q4_1": "int4", "Q4_K": "int4", "Q2_K": "int4", "Q3_K": "int4"}
BYTES = ("Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0")
LOSSY = ("Q2_K", "Q3_K")


@dataclass(frozen=True, slots=True)
class Part:
    """One foreign tensor that goes into a matrix, and how its rows must be reordered."""

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


def encoding_for(tensor: Tensor, wanted: str, grouped: bool) -> str:
    """The encoding of a matrix of this type. Raises UnsupportedError, naming type and tensor."""
    kind = tensor.kind
    if kind.read is None:
        raise UnsupportedError(
            f"{tensor.path.name}: tensor {tensor.name!r} has type {kind.name}, which outsize cannot "
            "read; use F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K"
        )
    if wanted != "auto":
        return wanted
    fits = grouped and tensor.shape[-1] % 64 == 0
    tiles = grouped or torch_reads_tiles()
    if kind.name in CODED and tiles and not (fits and kind.name in GROUPED):
        return CODED[kind.name]
    if kind.name not in BYTES and kind.name not in CODED and kind.name not in GROUPED:
        return "bf16"
    return GROUPED.get(kind.name, "group8") if fits else "int8"
