"""Loads a LoRA adapter into an open model: resident weights make room for it where need be."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

from outsize.engine.scheduler import Scheduler
from outsize.model.lora_file import read_adapter
from outsize.pack.format import Pack
from outsize.plan import beside

_one_at_a_time = threading.Lock()  # each sees what those before it hold


def load(scheduler: Scheduler, pack: Pack, name: str, file: Path) -> None:
    """Read an adapter, once there is room for it. Raises AdapterError, and BudgetError before anything is
    read."""
    size, moment = beside.adapter_bytes(name, file, pack.description, pack.path.name)
    with _one_at_a_time:
        scheduler.take(partial(make_room, scheduler, pack, name, size, moment))
        scheduler.adapters[name] = read_adapter(pack, name, file)


def make_room(scheduler: Scheduler, pack: Pack, name: str, size: int, moment: int) -> None:
    """For an adapter of `size` bytes beside those that there are, which takes `moment` bytes more while it is
    read, in place of a step's scratch: resident weights are dropped where need be. Raises BudgetError if that
    is not enough."""
    transformer, sizes = scheduler.transformer, {n: a.nbytes for n, a in scheduler.adapters.items()}
    placement = scheduler.placement = beside.with_sizes(scheduler.placement, sizes, pack)
    due = size + max(0, moment - placement.fixed["scratch"])
    short = beside.missing(placement, due, scheduler.given_up)
    if short > transformer.memory.droppable:
        raise beside.refusal(name, placement, due, short, transformer.memory.droppable)
    if short:
        scheduler.give_up(short, f"adapter {name} takes {due / 1e6:,.0f} MB")
    scheduler.placement = beside.with_sizes(placement, sizes | {name: size}, pack)
    if scheduler.prefixes is not None:
        scheduler.prefixes.limit(scheduler.placement.kv_tokens)
