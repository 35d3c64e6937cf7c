"""Bundles of few neurons, in the order of their use: gate and up rows as rows of an encoding that stores
rows apart, and down by columns, each a row of eight bits with a scale of its own.

What a pack keeps in tiles of 16 rows, and down in groups along the neurons, cannot be cut so finely as it
is. Rows of Q4_0, Q5_0 and Q8_0, of int8 and of floats keep their numbers; others, and down, are re-
encoded, in more bits than they have. (docs/results/neurons.md says why neighbours in bundles of 32 do not
do.)

Shapes: F neurons of a layer, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outsize.encoding.find import encoding
from outsize.encoding.group import Group
from outsize.encoding.palette import Palette
from outsize.encoding.plain import Fields
from outsize.errors import UnsupportedError
from outsize.kernels.layouts import BLOCK
from outsize.kernels.palettes import TILE, unpack_codes
from outsize.pack.bundles import DOWN, GATE, UP, BundleLayout, Prepared, Region, end_of, row_regions
from outsize.pack.tables import ALIGN, PAGE, Matrix, TableHeader, aligned

LEAST, MOST_PADDED = 8, 0.2  # neurons of a bundle; the share of a record that may be padding
SAME = {"q4_0": 4, "q5_0": 5, "q8_0": 8}  # palettes whose rows are groups, code for code
CODES, SCALE = "codes", "scale"  # of down


def bundle_of(header: TableHeader) -> int:
    """Neurons of a bundle: as few as fill pages."""
    neurons = header.tensors["down"][0].width
    for bundle in (LEAST << i for i in range(8)):
        form = layout(header, bundle) if neurons % bundle == 0 else None
        if form is not None and 1 - form.used / form.stride <= MOST_PADDED:
            return bundle
    return LEAST


def layout(header: TableHeader, bundle: int) -> BundleLayout:
    """Of a table of feed-forwards. Raises UnsupportedError for shapes that cannot be cut."""
    dense, down = header.tensors["gate_up"], header.tensors["down"]
    width, neurons = dense[0].width, sum(m.width for m in down[:1])
    halves = sum(m.num_rows for m in dense) // max(1, neurons)
    if neurons % bundle or sum(m.num_rows for m in dense) not in (neurons, 2 * neurons):
        raise UnsupportedError(
            f"table {header.name} has {neurons:,} neurons a layer, which bundles of {bundle} do not divide"
        )
    both = Matrix(row_encoding(dense), halves * neurons, width, 0)
    regions = row_regions(GATE, both, bundle, 0)
    regions += row_regions(UP, both, bundle, end_of(regions)) if halves == 2 else []
    at = end_of(regions)
    regions.append(Region(DOWN, CODES, torch.int8, (bundle, width), 0, bundle, 1, at))
    regions.append(Region(DOWN, SCALE, torch.bfloat16, (bundle,), 0, bundle, 1, end_of(regions)))
    end = aligned(end_of(regions), ALIGN)
    return BundleLayout(
        bundle, neurons // bundle, (both,), None, tuple(regions), (), aligned(end, PAGE)
    )


def row_encoding(pieces: tuple[Matrix, ...]) -> str:
    """What rows of these matrices are kept in."""
    names = {m.encoding for m in pieces}
    if len(names) == 1 and _stores_rows(pieces[0]):
        return pieces[0].encoding
    if pieces[0].width % BLOCK:
        return "int8"
    if len(names) == 1 and (bits := SAME.get(pieces[0].encoding)):
        return f"group{bits}"
    few = all(_bits(name) <= 4 for name in names)
    return "group5" if few else "group8"


def _stores_rows(matrix: Matrix) -> bool:
    """Is every field of a row a run of its own?"""
    return all(s.row_axis == 0 and s.rows == 1 for s in matrix.specs.values())


def _bits(name: str) -> int:
    found = encoding(name)
    return found.form.bits if isinstance(found, Palette) else 4 if name == "int4" else 8


def whole_rows(
    form: BundleLayout, gate_up: list[tuple[Matrix, Fields]], down_DF: Tensor, order_F: Tensor
) -> Prepared:
    """What bundles are cut out of: a layer's neurons in this order. `gate_up`: as the pack has it;
    `down_DF`: its numbers."""
    neurons, (matrix,) = form.neurons, form.gate_up
    firsts = [(GATE, 0), (UP, neurons)][: form.halves]
    rows = torch.cat([order_F + first for _, first in firsts])
    fields = _reordered(matrix, gate_up, rows)
    halves = {
        tensor: {f: fields[f].narrow(s.row_axis, first, neurons) for f, s in matrix.specs.items()}
        for tensor, first in firsts
    }
    down_FD = down_DF.T[order_F]
    scale = (down_FD.abs().amax(dim=1) / 127).to(torch.bfloat16)
    safe = scale.float().clamp_min(torch.finfo(torch.float32).tiny)
    codes = (down_FD / safe[:, None]).round().clamp(-127, 127).to(torch.int8)
    return halves | {DOWN: {CODES: codes, SCALE: scale}}


def _reordered(to: Matrix, pieces: list[tuple[Matrix, Fields]], rows: Tensor) -> dict[str, Tensor]:
    """Fields of `to` with these rows of the pieces, one below the other: exact where the encoding allows
    it."""
    first, fields = pieces[0]
    kind = encoding(to.encoding)
    if len(pieces) == 1 and first.encoding == to.encoding:
        return {name: field[rows] for name, field in fields.items()}
    if len(pieces) == 1 and first.encoding in SAME and isinstance(kind, Group):
        codes, step = fields["codes"], fields["step"].transpose(1, 2).flatten(0, 1)
        tiles = unpack_codes(kind.bits, codes).transpose(1, 2).reshape(len(codes) * TILE, -1)
        return kind.from_codes(tiles[rows].contiguous(), step[rows])
    numbers = [encoding(m.encoding).decode(f)[: m.num_rows] for m, f in pieces]
    return kind.encode(torch.cat(numbers)[rows])
