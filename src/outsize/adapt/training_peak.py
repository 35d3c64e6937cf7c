"""Memory that training takes: known before any is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from outsize.adapt.examples import TrainOptions
from outsize.adapt.head_loss import CHUNK_BYTES
from outsize.adapt.processes import to_come
from outsize.adapt.trainable import check_usual, number_type
from outsize.errors import BudgetError
from outsize.kernels.palettes import BLOCK, FORMS, TILE
from outsize.kernels.plain import PLAIN
from outsize.model_config import Description
from outsize.pack.format import Pack
from outsize.plan.warmup import runtime_bytes
from outsize.system import memory

OPTIMIZER = 50 << 20  # what torch loads for it
GPU_RUNTIME = 1 << 30  # of this machine's own memory
LEARNING = 16  # bytes of a number that learns: itself, its gradient, and AdamW's two
STREAM = 24  # bytes that a layer keeps of each number of a token's stream: before and after norms, scaled
TIMES = 2  # what is kept for gradients, with the gradients on their way and the allocator's gaps
CODE = 2  # bytes of a number whose table learns: its code, and its share of steps
MATRIX = (
    40  # bytes of a number of one matrix, while its gradient is made: codes as indices, products
)
CHUNKS = 4  # of logits at once
CHOOSING = 32  # bytes of a logit that a token is chosen by
MASK = 6  # bytes, once a pass, of each (token, key)


@dataclass(frozen=True, slots=True)
class Pass:
    """Tokens that go through the layers at once, without gradients: `rows` of each of `sequences`, which see
    `keys`. `stored`: are keys and values of all layers kept, to answer with?"""

    sequences: int
    rows: int
    keys: int
    stored: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What training does. Of each of `sequences` of a step, `rows` tokens keep what their gradients need, and
    see `keys` tokens each. `learning`: how many numbers learn; `rebuilt`: how many numbers of matrices are
    made anew from what learns, and kept until there are gradients; `tables`: are they made from codes?
    `between`: what passes between steps, to answer and to judge; `states`: numbers of states that are kept
    to judge by."""

    sequences: int
    rows: int
    keys: int
    learning: int
    rebuilt: int = 0
    tables: bool = False
    between: tuple[Pass, ...] = ()
    states: int = 0


def answering(options: TrainOptions, length: int) -> tuple[Pass, ...]:
    """Of a model that answers prompts itself, of so many tokens with their answers."""
    return (Pass(options.at_once, length, length, True),) if options.own_answers else ()


def on_tables(pack: Pack, work: Work) -> Work:
    """The same, where palettes' tables learn."""
    learning = rebuilt = 0
    for encoding, num_rows, width, count in _matrices(pack):
        form = FORMS.get(encoding)
        if form is not None and not form.levels:
            tiles = -(-num_rows // TILE)
            steps = width // (BLOCK if form.step == "int8" else form.group) * TILE
            learning += count * tiles * ((1 << form.bits) + steps)
            rebuilt += count * num_rows * width
    return replace(work, learning=learning, rebuilt=rebuilt, tables=True)


def peak_bytes(packs: Sequence[Pack], work: Work, gpu: bool = False) -> int:
    """About the most of this machine's own memory: plain numbers of each model, of which one is also open as
    a pack; what learns; and what a step takes, or what comes between. With a GPU, what is on its way to it
    and back."""
    d = packs[0].description
    itemsize = max(number_type(pack, torch.device("cpu")).itemsize for pack in packs)
    fixed = runtime_bytes(PLAIN) + OPTIMIZER + max(pack.size for pack in packs)
    if gpu:
        one = max(n * w * c for _, n, w, c in chain(*map(_matrices, packs)))
        moved = 12 * work.learning + 4 * work.rebuilt  # a checkpoint's; whole matrices, as begun
        return fixed + GPU_RUNTIME + max(moved, 2 * itemsize * one)
    fixed += itemsize * sum(map(numbers, packs)) + 4 * work.states
    fixed += CHUNKS * max(CHUNK_BYTES["cpu"], 8 * d.vocab_size)
    largest = max(n * w for _, n, w, _ in _matrices(packs[0], "layers"))
    made = work.rebuilt * (itemsize + CODE * work.tables) + MATRIX * largest * (work.rebuilt > 0)
    passing = max((_passing(d, p, itemsize) for p in work.between), default=0)
    beside = 4 * work.states + 4 * work.rebuilt * (not work.tables) + passing
    gathered = 4 * work.learning * (to_come()[1] > 1)
    return (
        fixed + LEARNING * work.learning + max(made + _kept(d, work, itemsize) + gathered, beside)
    )


def _row(d: Description, itemsize: int) -> int:
    """Bytes of a token in one layer, beside the keys that it sees."""
    return STREAM * d.width + itemsize * (2 * d.num_heads * d.head_dim + 4 * d.ffn_width)


def _layer(d: Description, p: Pass | Work, itemsize: int) -> int:
    """Bytes of a sequence in one layer: its rows, which keys each sees, and these keys and values."""
    keys = itemsize * 2 * d.num_heads * d.head_dim * p.keys
    return p.rows * (_row(d, itemsize) + itemsize * p.keys) + keys


def _kept(d: Description, work: Work, itemsize: int) -> int:
    """Bytes of every layer for gradients; and of one layer, where all tokens pass without any."""
    kept = _layer(d, work, itemsize)
    passing = work.keys * _row(d, itemsize) + (itemsize + MASK) * work.keys**2
    return work.sequences * (TIMES * d.num_layers * kept + passing)


def _passing(d: Description, p: Pass, itemsize: int) -> int:
    """Bytes of one layer; where tokens are chosen, of what is stored, old and new, and of logits."""
    one = _layer(d, p, itemsize) + MASK * p.rows * p.keys
    stored = 2 * d.num_layers * p.keys * itemsize * 2 * d.num_kv_heads * d.head_dim
    return p.sequences * (one + (stored + CHOOSING * d.vocab_size) * p.stored)


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


def on_gpu(options: TrainOptions) -> bool:
    return options.device != "cpu" and torch.cuda.is_available()


def check(packs: Sequence[Pack], work: Work, options: TrainOptions, beside: int = 0) -> None:
    """Of each process. Raises BudgetError where training takes more than may be used, or what comes `beside`
    it does; UnsupportedError for models that are not trained."""
    for pack in packs:
        check_usual(pack)
    local, world = to_come()
    work = replace(work, sequences=-(-work.sequences // world))
    peak = max(peak_bytes(packs, work, on_gpu(options)), beside)
    budget = memory.parse(options.memory) // (local if options.memory == "auto" else 1)
    if peak > budget:
        answers = any(p.stored for p in work.between)
        less = "--batch, --length or --at-once" if answers else "--batch or --length"
        raise BudgetError(
            f"training over {options.model} takes about {peak / 1e6:,.0f} MB of memory, and "
            f"{budget / 1e6:,.0f} MB may be used; give a larger --memory, or a smaller {less}"
        )
