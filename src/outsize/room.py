"""Memory for an adapter that is loaded into an open model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outsize.plan import beside

if TYPE_CHECKING:
    from outsize.api import Model


def make_room(model: Model, name: str, size: int) -> None:
    """For an adapter of `size` bytes beside those that there are: weights are given up where need be. Raises
    BudgetError if that is not enough."""
    transformer, sizes = model.transformer, {n: a.nbytes for n, a in model.adapters.items()}
    model.placement = beside.with_sizes(model.placement, sizes, model.pack)
    short = beside.missing(model.placement, size, model.given_up)
    if short > transformer.giveable:
        raise beside.refusal(name, model.placement, size, short, transformer.giveable)
    if short:
        model.give_up(short, f"adapter {name} takes {size / 1e6:,.0f} MB")
    model.placement = beside.with_sizes(model.placement, sizes | {name: size}, model.pack)
