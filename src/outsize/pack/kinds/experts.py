"""Experts: a record is one expert of one layer, all of it together: it is used whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from outsize.model_config import Description, Mixture
from outsize.pack.kinds.kind import Group, Kind
from outsize.pack.kinds.layers import gated, keys_fault, kind_fault, tables_of
from outsize.pack.records import FLOATS, Specs, matrix
from outsize.pack.tables import TableHeader
from outsize.pack.tensors import Part, Piece, Record, SourceTensors, TablePlan

LEAST_EXPERTS = 2  # times those that a token uses: slots that there must be
FUSED = "expert_gate_up"  # a family's name of gate and up in one tensor


class Experts(Kind):
    """The keys of a table's header are layer * experts + expert."""

    routed = True

    def groups(self, d: Description) -> Sequence[Group]:
        return () if d.mixture is None else (Group("experts", 4, _specs(d)),)

    def plan(self, group: Group, tensors: SourceTensors) -> list[TablePlan]:
        d, specs = tensors.description, dict(group.specs)
        if FUSED in tensors.recipe.names:
            specs["gate_up"] = matrix(d.width, (FUSED, 2 * _mixture(d).width))
        count = _mixture(d).count
        recipe = tensors.recipe
        make = partial(_turned if recipe.turned else _paired, tensors)
        stacked = recipe.turned or recipe.paired
        records = [
            make(i, e) if stacked else tensors.record(i, specs, e)
            for i in d.routed
            for e in range(count)
        ]
        return tables_of(group.name, "experts", records, count, d.routed)

    def fault(self, d: Description, group: Group, tables: Sequence[TableHeader]) -> str:
        problem = kind_fault("experts", group, tables)
        return problem or keys_fault(d, group.name, tables, _mixture(d).count)

    def least_slots(self, d: Description, table: TableHeader) -> int:
        return min(len(table.keys), LEAST_EXPERTS * _mixture(d).used)


def _mixture(d: Description) -> Mixture:
    assert d.mixture is not None
    return d.mixture


def _specs(d: Description) -> Specs:
    return gated(d, _mixture(d).bias, "expert_", _mixture(d).width)


def _turned(tensors: SourceTensors, i: int, e: int) -> Record:
    """An expert whose gate and up lie beside each other in one tensor of columns."""
    width, inner = tensors.description.width, _mixture(tensors.description).width
    both = tensors.find(FUSED, i, (width, 2 * inner), e)
    down = tensors.find("expert_down", i, (inner, width), e)
    return {
        name: (Piece(tensors.encoding(t), (Part(t, transposed=True),)),)
        for name, t in (("gate_up", both), ("down", down))
    }


def _paired(tensors: SourceTensors, i: int, e: int) -> Record:
    """An expert whose gate and up lie row by row in one tensor; transposed, if it is not in MXFP4."""
    width, inner = tensors.description.width, _mixture(tensors.description).width
    stack = tensors.all.get(tensors.source_name(FUSED, i))
    turned = stack is None or stack.kind.name != "MXFP4"
    way = -1 if turned else 1
    both = tensors.find(FUSED, i, (2 * inner, width)[::way], e)
    down = tensors.find("expert_down", i, (width, inner)[::way], e)
    bias = tensors.find(f"{FUSED}_bias", i, (2 * inner,), e)
    down_bias = tensors.find("expert_down_bias", i, (width,), e)
    halves = tuple(Part(both, transposed=turned, first=k, step=2) for k in (0, 1))
    return {
        "gate_up": (Piece(tensors.encoding(both), halves),),
        "down": (Piece(tensors.encoding(down), (Part(down, transposed=turned),)),),
        "gate_up_bias": tuple(Piece(FLOATS, (Part(bias, first=k, step=2),)) for k in (0, 1)),
        "down_bias": (Piece(FLOATS, (Part(down_bias),)),),
    }


KIND = Experts()
