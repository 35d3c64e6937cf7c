"""How much of a model a rank has memory for: neurons, or layers where ranks have those."""

from __future__ import annotations

from collections.abc import Mapping

from outsize.pack.outline import Outline
from outsize.pack.tables import TableHeader
from outsize.parallel.split import Way
from outsize.plan.fixed import all_bytes, fixed_costs

SPARE = 0.97  # of memory that is planned with
SHORTEST = 1024  # tokens of context that neurons must leave room for, where none is asked for


def most_parts(
    whole: Outline, told: Mapping[str, int], leads: bool, how: tuple[int | None, Way]
) -> int:
    """For how many neurons (or layers, where ranks have those) there is memory, by what a rank tells: bytes
    of its `memory`, and those that its `runtime` takes of it. `leads`: it has the head, too. `how`: tokens
    of context, and the way."""
    d, (context, way) = whole.description, how
    is_stage = way.cut == "layers"
    ffn = sum(t.size for t in whole.tables if (t.kind != "rows" if is_stage else _is_ffn(t)))
    count = d.num_layers if is_stage else d.ffn_width
    others = all_bytes(whole) - ffn
    if not leads:
        others -= whole.table("embed" if d.tied else "head").size
    need = fixed_costs(whole, told["runtime"], 0, context or min(SHORTEST, d.context))
    room = SPARE * told["memory"] - sum(need.values()) - others
    return max(0, int(room * count / ffn))


def _is_ffn(t: TableHeader) -> bool:
    return t.name.startswith("ffn")
