"""The layout of a bundle of neurons: where each stored field of its gate rows, up rows and down columns
lies in its record. Codes are moved, never re-encoded, so what is put together again is the dense matrix,
bit for bit.

Shapes: F neurons of a layer, N bundles of them, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outsize.encoding.find import encoding
from outsize.encoding.plain import slice_rows
from outsize.errors import UnsupportedError
from outsize.pack.tables import ALIGN, PAGE, Matrix, TableHeader, aligned

BUNDLE = 32  # neurons, or as many as the rows that an encoding stores together
GATE, UP, DOWN = "gate", "up", "down"
Fields = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Region:
    """One stored field in a record. `axis`: along which bundles follow each other in the dense field; `unit`:
    steps along it of one bundle; `each`: bundles that share a unit (a block's scale may span several)."""

    tensor: str  # GATE, UP or DOWN
    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    axis: int
    unit: int
    each: int
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class BundleLayout:
    """The bundles of a table of dense feed-forwards: `gate_up` in one matrix or in two, and `down`. Where
    there is no gate, `gate_up` is up alone, and stands in its place."""

    bundle: int  # neurons
    count: int  # bundles of a layer
    gate_up: tuple[Matrix, ...]
    down: (
        Matrix | None
    )  # None: by rows, a neuron's column each, of eight bits (pack/bundle_rows.py)
    regions: tuple[Region, ...]
    shared: tuple[str, ...]  # fields of `down` that all bundles share, and that are kept apart
    stride: int

    @property
    def neurons(self) -> int:
        return self.bundle * self.count

    @property
    def halves(self) -> int:
        """Rows of `gate_up` that a neuron has: of gate and up, or of up alone."""
        return sum(m.num_rows for m in self.gate_up) // self.neurons

    @property
    def room(self) -> int:
        """Bytes of one layer's matrices, put together."""
        rows = [r for r in self.regions if r.tensor == DOWN]
        down = self.count * sum(r.size for r in rows) if self.down is None else self.down.size
        return down + sum(m.size for m in self.gate_up)

    @property
    def used(self) -> int:
        """Bytes of a record that are not padding."""
        return sum(region.size for region in self.regions)


def bundle_of(header: TableHeader) -> int:
    """Neurons of a bundle: the least that no stored block of rows is cut by."""
    rows = [s.rows for m in header.tensors["gate_up"] for s in m.specs.values()]
    return max(BUNDLE, *rows)


def layout(header: TableHeader, bundle: int) -> BundleLayout:
    """Of the bundles of a table of feed-forwards. Raises UnsupportedError for shapes that cannot be cut."""
    gate_up, downs = header.tensors["gate_up"], header.tensors["down"]
    down, neurons = downs[0], downs[0].width
    if len(downs) > 1 or neurons % bundle:
        raise UnsupportedError(
            f"table {header.name} has {neurons:,} neurons a layer in {len(downs)} pieces; neurons are paged "
            f"where they are in one piece and a multiple of {bundle}"
        )
    if [m.num_rows for m in gate_up] not in ([neurons], [2 * neurons], [neurons, neurons]):
        raise UnsupportedError(f"table {header.name}: gate and up are not of {neurons:,} rows each")
    rows = max(s.rows for m in gate_up for s in m.specs.values())
    if bundle % rows:
        raise UnsupportedError(
            f"table {header.name} stores {rows} rows of gate and up together, which bundles of {bundle} "
            "neighbours would cut; give a multiple, or neurons by use"
        )
    count, regions, at = neurons // bundle, list[Region](), 0
    both = [(GATE, gate_up[0]), (UP, gate_up[-1])]
    for tensor, matrix in both[: sum(m.num_rows for m in gate_up) // neurons]:
        regions += row_regions(tensor, matrix, bundle, at)
        at = end_of(regions)
    shared = []
    for field, spec in down.specs.items():
        axis = column_axis(down, field)
        if axis is None:
            shared.append(field)
            continue
        unit, each = _units(spec.shape[axis], count, header.name)
        shape = (*spec.shape[:axis], unit, *spec.shape[axis + 1 :])
        regions.append(Region(DOWN, field, spec.dtype, shape, axis, unit, each, at))
        at = end_of(regions)
    return BundleLayout(
        bundle, count, gate_up, down, tuple(regions), tuple(shared), aligned(at, PAGE)
    )


def row_regions(tensor: str, matrix: Matrix, bundle: int, at: int) -> list[Region]:
    """The fields of a bundle's rows of a matrix, from byte `at` of its record on."""
    found: list[Region] = []
    for field, spec in matrix.specs.items():
        unit, axis = bundle // spec.rows, spec.row_axis
        shape = (*spec.shape[:axis], unit, *spec.shape[axis + 1 :])
        found.append(Region(tensor, field, spec.dtype, shape, axis, unit, 1, at))
        at = end_of(found)
    return found


def end_of(regions: Sequence[Region]) -> int:
    """Where the next region begins."""
    last = regions[-1]
    return last.offset + aligned(last.size, ALIGN)


def column_axis(matrix: Matrix, field: str) -> int | None:
    """The axis of a stored field that grows with the matrix's width; None: there is none."""
    kind = encoding(matrix.encoding)
    one = kind.specs(matrix.num_rows, matrix.width)[field].shape
    two = kind.specs(matrix.num_rows, 2 * matrix.width)[field].shape
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), None)


def _units(steps: int, count: int, name: str) -> tuple[int, int]:
    """Steps of one bundle, and how many bundles share them. Raises UnsupportedError."""
    if steps % count == 0:
        return steps // count, 1
    if count % steps == 0:
        return 1, count // steps
    raise UnsupportedError(
        f"table {name}: {count} bundles do not lie evenly over {steps} blocks of scales; neurons of this "
        "encoding are not paged: pack the model with --encoding int8"
    )


Prepared = Mapping[str, Fields]  # a layer's stored fields, by GATE, UP and DOWN


def whole_columns(form: BundleLayout, gate_up: Sequence[Fields], down: Fields) -> Prepared:
    """What bundles of neighbours are cut out of: the dense record's fields."""
    m, count = form.gate_up, form.neurons
    out: dict[str, Fields] = {GATE: slice_rows(m[0].specs, gate_up[0], 0, count), DOWN: down}
    if form.halves == 2:
        first = count if len(m) == 1 else 0
        out[UP] = slice_rows(m[-1].specs, gate_up[-1], first, first + count)
    return out


def cut(form: BundleLayout, prepared: Prepared, number: int) -> bytearray:
    """The record of one bundle of a layer."""
    out = bytearray(form.stride)
    for region in form.regions:
        at = number // region.each * region.unit
        some = prepared[region.tensor][region.field].narrow(region.axis, at, region.unit)
        raw = some.contiguous().view(-1).view(torch.uint8).numpy()
        out[region.offset : region.offset + region.size] = raw.tobytes()
    return out


@dataclass(frozen=True, slots=True)
class SharedField:
    """What is kept once a layer: a vector of the dense record (its norm, biases), or a field of `down`
    that all bundles share."""

    tensor: str
    piece: int
    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def of(self, row: Tensor) -> Tensor:
        """The field, in a layer's record of bytes: no copy."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return row[self.offset : self.offset + size].view(self.dtype).view(self.shape)


def shared_fields(header: TableHeader, form: BundleLayout) -> tuple[list[SharedField], int]:
    """Of a table of feed-forwards, and the bytes of a layer's record of them."""
    found, at = list[SharedField](), 0
    for tensor, matrices in sorted(header.tensors.items()):
        for piece, matrix in enumerate(matrices if tensor != "gate_up" else ()):
            for field, spec in matrix.specs.items():
                if tensor != DOWN or field in form.shared:
                    found.append(SharedField(tensor, piece, field, spec.dtype, spec.shape, at))
                    at += aligned(math.prod(spec.shape) * spec.dtype.itemsize, ALIGN)
    return found, aligned(at, PAGE)
