"""Held weights are given up when memory is short: an embedding, experts, layers, the head; answers stay."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import outsize
from outsize.caching.eviction.pin_and_ring import PinAndRing
from outsize.caching.policy import Hints, make
from outsize.engine import adapters
from outsize.engine.model import Model
from outsize.errors import BudgetError
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.model.lora import Adapter, widths
from outsize.model.lora_file import read_adapter
from outsize.pack.outline import of_pack
from outsize.plan import beside, place
from tests.drafts import write_peft
from tests.golden import tiny

POLICIES = ["echo", "lru", "fifo", "lfu", "lfru", "least_stale", "stale_cyclic"]


def logits(model: Model) -> torch.Tensor:
    t, rows = model.transformer, []
    kv = t.new_kv()
    for at, size in ((0, 12), (12, 1), (13, 1), (14, 3)):
        span = Span(at, tiny.TOKENS[at : at + size], size)
        rows.append(full(t, [span], [kv])[0].logits_KV)
    return torch.cat(rows)


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen3", "gemma3"])
def test_asked_for_everything_all_that_can_go_goes(
    family: str, encoding: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a mixture 7 % went: neither slots of experts nor embedding nor head were ever given up."""
    monkeypatch.setattr(place, "IN_FLIGHT_LEAST", 1)
    source = str(folder_of(family))
    with outsize.load(source, context=64, encoding=encoding, quiet=True, draft="none") as model:
        wanted, outline = logits(model), of_pack(model.pack)
        giveable = place.giveable(outline, model.placement)
        assert giveable > 0.3 * outline.size
        live = model.transformer.memory.droppable
        freed = model.transformer.memory.shrink(1 << 40)
        assert freed >= 0.9 * giveable
        assert abs(freed - live) <= 0.1 * live
        assert model.transformer.memory.shrink(1 << 40) == 0
        assert model.transformer.memory.droppable == 0
        for _ in range(2):
            assert torch.equal(logits(model), wanted)
        before = model.traffic.misses
        assert torch.equal(logits(model), wanted)
        assert model.traffic.misses > before


@pytest.mark.parametrize("policy", POLICIES)
def test_slots_of_experts_go_a_few_at_a_time(policy: str, folder_of: Callable[[str], Path]) -> None:
    source = str(folder_of("olmoe"))
    with outsize.load(source, context=64, quiet=True, experts=policy) as model:
        wanted, t = logits(model), model.transformer
        cache = t.loaded.banks[0].cache
        step = 5 * cache.table.header.stride
        t.memory.shrink(t._embed.resident_bytes)
        slots = [cache.slots]
        while t.memory.shrink(step) and len(slots) < 4:
            assert torch.equal(logits(model), wanted)
            slots.append(cache.slots)
    assert slots[1] == slots[0] - 5
    assert slots[-1] >= 6


@pytest.mark.parametrize("policy", [*POLICIES, "pinned"])
def test_a_slot_that_was_given_up_is_used_no_more(policy: str) -> None:
    hints = Hints(per_layer=8, layers=3)
    made = PinAndRing(12, range(6)) if policy == "pinned" else make(policy, 12, hints)
    for i in range(20):
        made.place([i])
    gone = set()
    while (found := made.drop_slot(4)) is not None:
        slot, _ = found
        assert slot not in gone
        gone.add(slot)
    assert len(gone) == 8
    for i in range(24):
        placed = made.place([i, (i + 1) % 24])
        assert not gone & set(placed.slots.values())
    assert made.room == 4


def test_an_adapter_that_there_is_no_room_for_is_refused_in_numbers(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with outsize.load(str(folder_of("llama")), context=64, quiet=True) as model:
        folder, words = write_peft(model, tmp_path / "a", 1), r"adapter a takes .* MB, and of the"
        free = model.placement.budget - model.placement.planned
        with monkeypatch.context() as patch:
            patch.setattr(beside, "adapter_bytes", lambda *_: (free + (1 << 40), 0))
            with pytest.raises(BudgetError, match=words):
                model.load_adapter("a", folder)
        assert not model.adapters
        assert model.given_up == 0
        tokens = model.placement.kv_tokens
        model.load_adapter("a", folder)
        assert model.placement.fixed["adapter a"] >= model.adapters["a"].nbytes > 0
        assert model.placement.planned <= model.placement.budget
        assert model.placement.kv_tokens <= tokens


def test_what_reading_an_adapter_takes_for_a_moment_is_asked_for(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of a large rank takes eight times its bytes while it is made, a step's scratch or more."""
    with outsize.load(str(folder_of("llama")), context=64, quiet=True) as model:
        folder = write_peft(model, tmp_path / "a", 1)
        free = model.placement.budget - model.placement.planned
        moment = free + model.placement.fixed["scratch"] + (1 << 40)
        monkeypatch.setattr(beside, "adapter_bytes", lambda *_: (1, moment))
        with pytest.raises(BudgetError, match="adapter a takes"):
            model.load_adapter("a", folder)
        assert not model.adapters


def test_adapters_that_two_threads_load_are_counted_both(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each saw only those that were there when it began."""
    with outsize.load(str(folder_of("llama")), context=64, quiet=True) as model:
        folder, real = write_peft(model, tmp_path / "a", 1), read_adapter

        def slowly(*about: Any) -> Adapter:
            time.sleep(0.2)
            return real(*about)

        monkeypatch.setattr(adapters, "read_adapter", slowly)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: model.load_adapter(name, folder), "ab"))
        fixed = model.placement.fixed
        assert {"adapter a", "adapter b"} <= fixed.keys()


def test_what_else_an_adapters_file_holds_is_not_read(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """A sparse file of 3 GB took 5.7 GB, under any budget."""
    with outsize.load(str(folder_of("llama")), context=64, quiet=True) as model:
        d, size = model.pack.description, 64 << 20
        rows, width = widths(d)["q"]
        shapes = {"0.q.A": (2, width), "0.q.B": (rows, 2), "more": (size // 4,)}
        header: dict[str, Any] = {"__metadata__": {"outsize": json.dumps({"scale": 1.0})}}
        at = 0
        for name, shape in shapes.items():
            stop = at + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, stop]}
            at = stop
        text, file = json.dumps(header).encode(), tmp_path / "a.safetensors"
        with open(file, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + at)
        tracemalloc.start()
        model.load_adapter("a", file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < size // 2
