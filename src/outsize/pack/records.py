"""One record of a table: its tensors, their exact shapes, where they lie; and whether a pack's are so.

Compiled kernels and torch's views take shapes, offsets and strides at their word. A checksum tells that a
header is whole, not that it is honest: packs travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from outsize.encoding.find import ENCODINGS
from outsize.errors import UnsupportedError
from outsize.pack.tables import ALIGN, PAGE, Matrix, TableHeader, aligned

FLOATS = "fp32"
CONTEXT = "token_context"  # a layer's rows of a matrix of all layers
POSITIONS = "positions"  # a learned vector for each
# Matrices that are read in fp32 only, as all vectors are.
FIXED = frozenset({"router", "delta_gates", POSITIONS})
# Maps of latent attention, which are products of each head apart: floats of 16 bits where others are codes.
HALVES, HALF = frozenset({"k_b", "v_b"}), "bf16"
Layout = dict[str, tuple[Matrix, ...]]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a record, and the tensors of a family that make it: matrices one below the other,
    vectors end to end."""

    parts: tuple[
        tuple[str, int], ...
    ]  # the family's name of each, and its rows (of a vector: its numbers)
    width: int  # of the rows; 0: a vector

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.parts)


Specs = Mapping[str, TensorSpec]  # by our names, in the order in which they lie in the record


def matrix(width: int, *parts: tuple[str, int]) -> TensorSpec:
    """Rows of this width, so many of each (name, rows)."""
    return TensorSpec(parts, width)


def vector(*parts: tuple[str, int]) -> TensorSpec:
    """Numbers, so many of each (name, length)."""
    return TensorSpec(parts, 0)


def lay_out(tensors: Layout) -> tuple[Layout, int]:
    """Give every matrix its offset in the record; the record's stride."""
    out, at = {}, 0
    for name, matrices in tensors.items():
        placed = []
        for m in matrices:
            placed.append(Matrix(m.encoding, m.num_rows, m.width, at))
            at += m.size
        out[name] = tuple(placed)
    return out, aligned(at, PAGE)


def record_fault(table: TableHeader, due: Specs) -> str:
    """What is wrong with the records of a table, in a clause; "" if nothing is."""
    if not table.keys:
        return "it has no records"
    if set(table.tensors) != set(due):
        wrong = min(set(table.tensors) ^ set(due))
        return f"tensor {wrong[:80]!r} is {'missing' if wrong in due else 'not one of its own'}"
    for name, spec in due.items():
        if problem := _tensor_fault(name, spec, table.tensors[name]):
            return problem
    return _layout_fault(table)


def _tensor_fault(name: str, due: TensorSpec, pieces: Sequence[Matrix]) -> str:
    """Are these pieces, one below the other (of a vector: end to end), the tensor that is due?"""
    if not pieces or any(m.num_rows <= 0 or m.width <= 0 for m in pieces):
        return f"tensor {name!r} has pieces without rows, or none"
    if due.width:
        is_right = sum(m.num_rows for m in pieces) == due.rows
        is_right = is_right and {m.width for m in pieces} == {due.width}
    else:
        is_right = sum(m.width for m in pieces) == due.rows and {m.num_rows for m in pieces} == {1}
    if not is_right:
        rows, width = (due.rows, due.width) if due.width else (1, due.rows)
        shapes = ", ".join(f"{m.num_rows:,} x {m.width:,}" for m in pieces[:8])
        return f"tensor {name!r} has {shapes} numbers, {rows:,} x {width:,} are due"
    if name in FIXED or not due.width:
        in_pieces = due.width and len(pieces) > 1
        if in_pieces or any(m.encoding != FLOATS for m in pieces):
            return f"tensor {name!r} is not in {FLOATS}, or in pieces"
    if name in HALVES and (len(pieces) > 1 or pieces[0].encoding not in (FLOATS, HALF)):
        return f"tensor {name!r} is in neither {HALF} nor {FLOATS}, or in pieces"
    return next((p for m in pieces if (p := _encoding_fault(name, m))), "")


def _encoding_fault(name: str, matrix: Matrix) -> str:
    if matrix.encoding not in ENCODINGS:
        known = ", ".join(ENCODINGS)
        return f"tensor {name!r}: encoding {matrix.encoding[:80]!r} is not known; known are {known}"
    try:
        assert matrix.specs
    except UnsupportedError as e:
        return f"tensor {name!r}: {e}"
    return ""


def _layout_fault(table: TableHeader) -> str:
    """Matrices follow each other without holes, as they were written, so that none lies over another or
    beyond the record."""
    at = 0
    for m in sorted(_all(table), key=lambda m: m.offset):
        if m.offset != at or at % ALIGN:
            return f"a matrix begins at byte {m.offset:,} of its record, {at:,} is due"
        at += m.size
    if table.stride != aligned(at, PAGE):
        return f"its records have {table.stride:,} bytes, {aligned(at, PAGE):,} are due"
    return ""


def mixed_fault(tables: Iterable[TableHeader]) -> str:
    """Activations are in fp32 where all matrices are, else in bf16."""
    kinds = {
        m.encoding == FLOATS
        for table in tables
        if table.kind != "tokens"
        for name, pieces in table.tensors.items()
        for m in pieces
        if m.num_rows > 1 and name not in FIXED
    }
    return "some of its matrices are in fp32, others are not" if len(kinds) > 1 else ""


def _all(table: TableHeader) -> Iterable[Matrix]:
    return (m for pieces in table.tensors.values() for m in pieces)
