"""Neurons: a record is a bundle of neighbouring neurons of a dense feed-forward: gate rows, up rows, down
columns (LLM in a flash, arXiv 2312.11514).

No checkpoint has them and no pack must: they are made of a pack's own records (weights/bundles.py) and lie
beside it. pack/bundles.py has their layout.
"""

from __future__ import annotations

from collections.abc import Sequence

from outsize.model_config import Description
from outsize.pack.kinds.kind import Group, Kind
from outsize.pack.tables import TableHeader
from outsize.pack.tensors import SourceTensors, TablePlan

LEAST = 16  # slots: what a step needs beyond passes through them in turn


class Neurons(Kind):
    """The keys of a table's header are layer * bundles + bundle."""

    routed = True

    def groups(self, d: Description) -> Sequence[Group]:
        return ()

    def plan(self, group: Group, tensors: SourceTensors) -> list[TablePlan]:
        return []

    def fault(self, d: Description, group: Group, tables: Sequence[TableHeader]) -> str:
        return ""

    def least_slots(self, d: Description, table: TableHeader) -> int:
        return min(len(table.keys), LEAST)


KIND = Neurons()
