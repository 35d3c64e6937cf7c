"""Memory that training takes: known before any is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from outsize.adapt.examples import TrainOptions
from outsize.adapt.head_loss import CHUNK_BYTES
from outsize.adapt.loop import Recipe
from outsize.adapt.trainable import number_type
from outsize.errors import BudgetError
from outsize.kernels.palettes import BLOCK, FORMS, TILE
from outsize.kernels.plain import PLAIN
from outsize.model_config import Description
from outsize.pack.format import Pack
from outsize.plan.warmup import runtime_bytes
from outsize.system import memory

LEARNING = 16  # bytes of a number that learns: itself, its gradient, and AdamW's two
STREAM = 24  # bytes that a layer keeps of each number of a token's stream: before and after norms, scaled
TIMES = 2  # what is kept for gradients, with the gradients on their way and the allocator's gaps
CODE = 2  # bytes of a number whose table learns: its code, and its share of steps
MATRIX = (
    40  # bytes of a number of one matrix, while its gradient is made: codes as indices, products
)
CHUNKS = 4  # of logits at once


@dataclass(frozen=True, slots=True)
class Work:
    """What one step does. Of each of `sequences`, `rows` tokens keep what their gradients need, and see
    `keys` tokens each. `learning`: how many numbers learn; `rebuilt`: how many numbers of matrices are made
    anew from what learns, and kept until there are gradients; `tables`: are they made from codes?"""

    sequences: int
    rows: int
    keys: int
    learning: int
    rebuilt: int = 0
    tables: bool = False


def distilling(d: Description, recipe: Recipe, learning: int) -> Work:
    """Of whole sequences."""
    length = min(recipe.length, d.context)
    return Work(recipe.batch, length, length, learning)


def on_tables(pack: Pack, recipe: Recipe) -> Work:
    """Of whole sequences, where palettes' tables learn."""
    learning = rebuilt = 0
    for encoding, num_rows, width, count in _matrices(pack):
        form = FORMS.get(encoding)
        if form is not None and not form.levels:
            tiles = -(-num_rows // TILE)
            steps = width // (BLOCK if form.step == "int8" else form.group) * TILE
            learning += count * tiles * ((1 << form.bits) + steps)
            rebuilt += count * num_rows * width
    work = distilling(pack.description, recipe, learning)
    return replace(work, rebuilt=rebuilt, tables=True)


def on_gpu(options: TrainOptions) -> bool:
    return options.device != "cpu" and torch.cuda.is_available()


def peak_bytes(packs: Sequence[Pack], work: Work, gpu: bool = False) -> int:
    """About the most of this machine's own memory: plain numbers of each model, of which one is also open as
    a pack; what learns, and is made of it; what a batch keeps. With a GPU, a pack and one matrix on its
    way."""
    d = packs[0].description
    itemsize = max(number_type(pack, torch.device("cpu")).itemsize for pack in packs)
    if gpu:
        one = max(n * w * c for _, n, w, c in chain(*map(_matrices, packs)))
        return runtime_bytes(PLAIN) + max(pack.size for pack in packs) + 4 * one
    plain = itemsize * sum(map(numbers, packs))
    largest = max(n * w for _, n, w, _ in _matrices(packs[0], "layers"))
    made = work.rebuilt * (itemsize + CODE * work.tables) + MATRIX * largest * (work.rebuilt > 0)
    chunks = CHUNKS * max(CHUNK_BYTES["cpu"], 8 * d.vocab_size)
    opened = max(pack.size for pack in packs)
    fixed = runtime_bytes(PLAIN) + plain + opened + chunks
    return fixed + LEARNING * work.learning + made + _batch(d, work, itemsize)


def _batch(d: Description, work: Work, itemsize: int) -> int:
    """What is kept of every layer for gradients; and of one layer, where all tokens pass without any."""
    heads = d.num_heads * d.head_dim
    row = STREAM * d.width + itemsize * (2 * heads + 4 * d.ffn_width)
    mask, keys = itemsize * work.rows * work.keys, itemsize * 2 * heads * work.keys
    kept = d.num_layers * (work.rows * row + mask + keys)
    passing = work.keys * row + itemsize * work.keys**2
    return work.sequences * (TIMES * kept + passing)


def numbers(pack: Pack) -> int:
    """Weights of a model."""
    return sum(n * w * count for _, n, w, count in _matrices(pack))


def _matrices(pack: Pack, kind: str = "") -> Iterator[tuple[str, int, int, int]]:
    """Encoding, rows, width, and in how many records, of all tables or those of a kind."""
    for table in pack.tables:
        for m in (m for pieces in table.tensors.values() for m in pieces):
            if kind in ("", table.kind):
                yield m.encoding, m.num_rows, m.width, len(table.keys)


def learning_of(d: Description, rank: int) -> int:
    """Numbers of factors of a rank on every map."""
    heads, keys = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    sides = 4 * d.width + 2 * heads + 2 * keys + 3 * (d.width + d.ffn_width)
    return rank * d.num_layers * sides


def check(packs: Sequence[Pack], work: Work, options: TrainOptions, beside: int = 0) -> None:
    """Raises BudgetError where training takes more than may be used, or what comes `beside` it does."""
    peak = max(peak_bytes(packs, work, on_gpu(options)), beside)
    budget = memory.parse(options.memory)
    if peak > budget:
        raise BudgetError(
            f"training over {options.model} takes about {peak / 1e6:,.0f} MB of memory, and "
            f"{budget / 1e6:,.0f} MB may be used; give a larger --memory, or a smaller --batch or --length"
        )
