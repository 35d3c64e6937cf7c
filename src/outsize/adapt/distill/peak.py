"""Memory that distilling takes: known before any is taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from outsize.adapt.examples import TrainOptions
from outsize.adapt.head_loss import CHUNK_BYTES
from outsize.adapt.loop import Recipe
from outsize.adapt.run import number_type
from outsize.errors import BudgetError
from outsize.kernels.plain import PLAIN
from outsize.model_config import Description
from outsize.pack.format import Pack
from outsize.plan.warmup import runtime_bytes
from outsize.system import memory

LEARNING = 16  # bytes of a number that learns: itself, its gradient, and AdamW's two
KEPT = 100  # bytes for each number of the stream, that a layer keeps of a token until its gradient is made
CHUNKS = 4  # of logits at once


def peak_bytes(packs: Sequence[Pack], recipe: Recipe, learning: int) -> int:
    """About the most: plain numbers of each model, of which one is also open as a pack; what learns (so many
    numbers); a byte for each code; a batch on its way."""
    d = packs[0].description
    plain = sum(number_type(pack, torch.device("cpu")).itemsize * _numbers(pack) for pack in packs)
    tokens = recipe.batch * min(recipe.length, d.context)
    run = tokens * (d.num_layers * KEPT * d.width + recipe.length + 8 * d.width)
    codes = _numbers(packs[-1])
    chunks = CHUNKS * max(CHUNK_BYTES["cpu"], 8 * d.vocab_size)
    opened = max(pack.size for pack in packs)
    return runtime_bytes(PLAIN) + plain + LEARNING * learning + codes + run + chunks + opened


def _numbers(pack: Pack) -> int:
    return sum(
        len(t.keys) * m.num_rows * m.width
        for t in pack.tables
        for pieces in t.tensors.values()
        for m in pieces
    )


def learning_of(d: Description, rank: int) -> int:
    """Numbers of factors of a rank on every map."""
    heads, keys = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    sides = 4 * d.width + 2 * heads + 2 * keys + 3 * (d.width + d.ffn_width)
    return rank * d.num_layers * sides


def check(peak: int, options: TrainOptions) -> None:
    """Raises BudgetError."""
    budget = memory.parse(options.memory)
    if peak > budget:
        raise BudgetError(
            f"training over {options.model} takes about {peak / 1e6:,.0f} MB of memory, and "
            f"{budget / 1e6:,.0f} MB may be used; give a larger --memory, or a smaller --batch or --length"
        )
