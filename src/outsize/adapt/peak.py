"""Memory that fewer bits take: known before any is taken."""

from __future__ import annotations

from outsize.adapt.calibration import HELD_OUT, due
from outsize.adapt.divergence import ROWS
from outsize.adapt.statistics import AT_ONCE
from outsize.errors import BudgetError
from outsize.pack.format import Pack

SQUARES = 7  # fp32 matrices of a map's inputs by themselves: moments, factors, and what makes them
COPIES = 8  # of a matrix, while it is rounded: numbers, steps, codes, what is carried on
WIDE = 8  # activations of the widest map at once
LOGITS = 8


def peak_bytes(base: Pack, itemsize: int, runtime: int) -> int:
    """About the most: the model as plain numbers of `itemsize` bytes and its states on the text, and what one
    matrix takes; while it is loaded, the pack itself. `runtime`: interpreter and libraries."""
    d, numbers, largest = base.description, 0, 0
    for table in base.tables:
        for matrix in (m for pieces in table.tensors.values() for m in pieces):
            size = matrix.num_rows * matrix.width
            numbers += size * len(table.keys)
            largest = max(largest, size if table.kind == "layers" else 0)
    widest = max(d.ffn_width, d.width, d.num_heads * d.head_dim)
    states = 4 * d.width * (due(d) + 2 * HELD_OUT)
    one = 4 * (SQUARES * widest**2 + COPIES * largest + LOGITS * ROWS * d.vocab_size)
    run = 4 * WIDE * AT_ONCE * max(2 * d.ffn_width, d.width)
    return runtime + itemsize * numbers + max(base.size, states + max(one, run))


def check(base: Pack, peak: int, budget: int) -> None:
    """Raises BudgetError."""
    if peak > budget:
        raise BudgetError(
            f"fewer bits of {base.path.name} take about {peak / 1e6:,.0f} MB of memory while they are "
            f"fitted, and {budget / 1e6:,.0f} MB may be used; give a larger --memory, or pack on a larger "
            "machine and copy the folder"
        )
