"""How fast a rank is, for sharing a model's neurons out: bytes of its matrices that it multiplies a
second, and how many neurons it has memory for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from outsize.encoding.find import encoding
from outsize.kernels.backend import Backend
from outsize.pack.format import Pack
from outsize.pack.outline import Outline
from outsize.pack.tables import TableHeader
from outsize.parallel.split import Way
from outsize.plan.fixed import all_bytes, fixed_costs
from outsize.plan.probe import median_s
from outsize.storage.table import activation_type

ROWS = 1024  # of the matrix that is measured
SPARE = 0.97  # of memory that is planned with
SHORTEST = 1024  # tokens of context that neurons must leave room for, where none is asked for


@torch.inference_mode()
def bytes_per_s(pack: Pack, backend: Backend) -> float:
    """Of one row times a matrix as the model's feed-forwards have."""
    named = ("ffn", "dense", "experts")
    table = next(t for t in pack.tables if t.name.split("-")[0] in named and "gate_up" in t.tensors)
    m = table.tensors["gate_up"][0]
    rows = min(ROWS, m.num_rows)
    e = encoding(m.encoding, backend)
    fields = e.encode(torch.randn(rows, m.width, dtype=torch.float32, device="cpu"))
    dtype = activation_type((m,))
    x, multiply = torch.randn(1, m.width, dtype=dtype, device="cpu"), e.product(fields)
    return sum(f.nbytes for f in fields.values()) / median_s(lambda: multiply(x, False), 15)


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
