"""The tables of a model's pack: worked out from a checkpoint's headers, and checked in a pack's. What each
kind of table holds, pack/kinds/ says."""

from __future__ import annotations

import re
from collections.abc import Sequence

from outsize.checkpoint.checkpoint import Checkpoint
from outsize.model_config import Description, Recipe
from outsize.pack.kinds.kind import groups
from outsize.pack.records import mixed_fault
from outsize.pack.tables import TableHeader
from outsize.pack.tensors import LOSSY, SourceTensors, TablePlan
from outsize.pack.unused import refuse_unused

NAME = re.compile(r"[a-z]+(-[0-9]{1,6})?")  # of a table; its file is called so


def plan(checkpoint: Checkpoint, recipe: Recipe, wanted: str, grouped: bool) -> list[TablePlan]:
    """Every table of the pack. Reads nothing. Raises CheckpointError, UnsupportedError."""
    tensors = SourceTensors(checkpoint, recipe, wanted, grouped)
    made = [kind.plan(group, tensors) for kind, group in groups(recipe.description)]
    refuse_unused(checkpoint.tensors, tensors.used, recipe)
    return [table for tables in made for table in tables]


def lossy_tensors(tables: Sequence[TablePlan]) -> list[str]:
    """Tensors that are re-encoded in fewer levels than they have."""
    pieces = (x for t in tables for r in t.records for ps in r.values() for x in ps)
    return [
        p.tensor.name
        for x in pieces
        if x.encoding == "int4"
        for p in x.parts
        if p.tensor.kind.name in LOSSY
    ]


def fault(d: Description, tables: Sequence[TableHeader]) -> str:
    """What is wrong with the tables of a model of sound description, in a clause; "" if nothing is."""
    due = groups(d)
    found: dict[str, list[TableHeader]] = {group.name: [] for _, group in due}
    seen = set[str]()
    for table in tables:
        name = table.name
        if name in seen or not NAME.fullmatch(name) or name.split("-")[0] not in found:
            return f"a table {name[:80]!r} has no place in it"
        seen.add(name)
        found[name.split("-")[0]].append(table)
    for kind, group in due:
        if problem := kind.fault(d, group, found[group.name]):
            return problem
    return mixed_fault(tables)
