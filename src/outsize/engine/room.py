"""Memory for an adapter that is loaded into an open model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from outsize.model.lora_file import read_adapter
from outsize.plan import beside

if TYPE_CHECKING:
    from outsize.engine.model import Model

_one_at_a_time = threading.Lock()  # each sees what those before it hold


def load(model: Model, take: Callable[[Callable[[], None]], None], name: str, file: Path) -> None:
    """Read an adapter; weights make room for it in a turn that `take` gives. Raises AdapterError, and
    BudgetError before anything is read."""
    size, moment = beside.adapter_bytes(name, file, model.pack.description, model.pack.path.name)
    with _one_at_a_time:
        take(partial(make_room, model, name, size, moment))
        model.adapters[name] = read_adapter(model.pack, name, file)


def make_room(model: Model, name: str, size: int, moment: int) -> None:
    """For an adapter of `size` bytes beside those that there are, which takes `moment` bytes more while it is
    read, in place of a step's scratch: weights are given up where need be. Raises BudgetError if that is not
    enough."""
    transformer, sizes = model.transformer, {n: a.nbytes for n, a in model.adapters.items()}
    model.placement = beside.with_sizes(model.placement, sizes, model.pack)
    due = size + max(0, moment - model.placement.fixed["scratch"])
    short = beside.missing(model.placement, due, model.given_up)
    if short > transformer.giveable:
        raise beside.refusal(name, model.placement, due, short, transformer.giveable)
    if short:
        model.give_up(short, f"adapter {name} takes {due / 1e6:,.0f} MB")
    model.placement = beside.with_sizes(model.placement, sizes | {name: size}, model.pack)
