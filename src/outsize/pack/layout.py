"""The tables of a model's pack: worked out from a checkpoint's headers, and checked in a pack's. What each
kind of table holds, pack/kinds/ says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from outsize.checkpoint.checkpoint import Checkpoint, read_floats
from outsize.errors import UnsupportedError
from outsize.family.recipe import Recipe
from outsize.model_config import Description
from outsize.pack.kinds.kind import groups
from outsize.pack.records import FLOATS, mixed_fault
from outsize.pack.tables import TableHeader
from outsize.pack.tensors import LOSSY, Part, SourceTensors, TablePlan
from outsize.pack.unused import refuse_unused

NAME = re.compile(r"[a-z]+(-[0-9]{1,6})?")  # of a table; its file is called so


def plan(checkpoint: Checkpoint, recipe: Recipe, wanted: str, grouped: bool) -> list[TablePlan]:
    """Every table of the pack. Reads nothing. Raises CheckpointError, UnsupportedError."""
    tensors = SourceTensors(checkpoint, recipe, wanted, grouped)
    made = [kind.plan(group, tensors) for kind, group in groups(recipe.description)]
    refuse_unused(checkpoint.tensors.keys() - checkpoint.perhaps_zero, tensors.used, recipe)
    return [table for tables in made for table in tables]


def lossy_tensors(tables: Sequence[TablePlan]) -> list[str]:
    """Tensors that are re-encoded in fewer levels than they have."""
    return [
        part.tensor.name
        for part, encoding in _parts(tables)
        if encoding == "int4" and part.tensor.kind.name in LOSSY
    ]


def rounded_tensors(tables: Sequence[TablePlan]) -> list[tuple[str, str, str]]:
    """Quantized matrices of safetensors that their pack's encoding does not hold exactly: the name of each,
    how it is stored, and the encoding."""
    return [
        (part.tensor.name, part.tensor.kind.name, encoding)
        for part, encoding in _parts(tables)
        if part.tensor.joined is not None and encoding not in (part.tensor.kind.name, FLOATS)
    ]


def refuse_biases(checkpoint: Checkpoint, tables: Sequence[TablePlan]) -> None:
    """Reads the biases that no table has and GPTQ's tools may have written for nothing. Raises
    UnsupportedError for one that is not zero."""
    used = {part.tensor.name for part, _ in _parts(tables)}
    for name in sorted(checkpoint.perhaps_zero & checkpoint.tensors.keys() - used):
        if read_floats(checkpoint.tensors[name]).any():
            raise UnsupportedError(
                f"tensor {name!r} is not used by this model, whose config does not ask for it, and is not "
                "zero; use a GGUF of the model"
            )


def _parts(tables: Sequence[TablePlan]) -> Iterator[tuple[Part, str]]:
    """What all tables are made of, and the encoding of each."""
    pieces = (p for t in tables for r in t.records for ps in r.values() for p in ps)
    return ((part, piece.encoding) for piece in pieces for part in piece.parts)


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
