"""What a pack of a checkpoint will hold, worked out from headers alone."""

from __future__ import annotations

from collections.abc import Sequence

from outsize.checkpoint.checkpoint import Checkpoint
from outsize.model_config import Recipe
from outsize.pack.kinds.find import groups
from outsize.pack.strangers import refuse_strangers
from outsize.pack.tensors import LOSSY, SourceTensors, TablePlan


def plan(checkpoint: Checkpoint, recipe: Recipe, wanted: str, grouped: bool) -> list[TablePlan]:
    """Every table of the pack. Reads nothing. Raises CheckpointError, UnsupportedError."""
    tensors = SourceTensors(checkpoint, recipe, wanted, grouped)
    made = [kind.plan(group, tensors) for kind, group in groups(recipe.description)]
    refuse_strangers(checkpoint.tensors, tensors.used, recipe)
    return [table for tables in made for table in tables]


def lossy_tensors(tables: Sequence[TablePlan]) -> list[str]:
    """Tensors that are re-encoded in fewer levels than they have."""
    parts = (p for t in tables for r in t.records for ps in r.values() for x in ps for p in x.parts)
    return [part.tensor.name for part in parts if part.tensor.kind.name in LOSSY]
