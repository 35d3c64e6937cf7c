"""Giving up weights, broken off; and broken-off steps after weights were given up."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import outsize
from outsize.engine.model import Model
from outsize.pack.kinds import rows
from outsize.weights.residency import RecordCache
from tests.laws import test_interrupts as interrupts
from tests.laws.test_interrupts import Place, answer, broken_off, places, watched

SHRINKS, BREAKS = 8, 6  # places that are tried
FAMILIES = ["qwen3", "gpt_oss"]
SHRINKING = tuple(
    str(interrupts.SOURCE / name) for name in ("weights", "model")
)  # where bookkeeping is


@pytest.fixture(autouse=True)
def many_records(monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    """Of a head, so that there is something of it to give up."""
    monkeypatch.setattr(rows, "ROW_RECORD", 1)


def opened(folder: Path, draft: str = "none") -> Model:
    torch.set_num_threads(1)
    return outsize.load(str(folder), context=64, quiet=True, draft=draft)


def shrink(model: Model) -> None:
    """As a step does that finds memory short."""
    model.scheduler.take(partial(model.scheduler.give_up, 1 << 40, "test"))


def lines_of_a_shrink(folder: Path) -> list[Place]:
    seen: dict[tuple[str, int], int] = {}
    with opened(folder) as model:
        answer(model)

        def count(frame: object) -> None:
            at = frame.f_code.co_filename, frame.f_lineno  # type: ignore[attr-defined]
            seen[at] = seen.get(at, 0) + 1

        with watched(count, SHRINKING):
            shrink(model)
    chosen = random.Random(5)
    return [(path, line, chosen.randrange(times)) for (path, line), times in sorted(seen.items())]


def sweep(folder: Path, most: int | None) -> None:
    every = lines_of_a_shrink(folder)
    some = every if most is None else random.Random(6).sample(every, most)
    with opened(folder) as model:
        right = answer(model)
    for place in some:
        with opened(folder) as model:
            answer(model)
            assert broken_off(model, place, shrink)
            assert answer(model) == right, f"after an interrupt at {place}"
            shrink(model)
            assert answer(model) == right, f"after an interrupt at {place}, and once more"
            assert model.transformer.memory.droppable == 0


@pytest.mark.parametrize("family", ["qwen3", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_shrink_that_is_broken_off(family: str, folder_of: Callable[[str], Path]) -> None:
    sweep(folder_of(family), SHRINKS)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "olmoe", "llama"])
def test_a_shrink_that_is_broken_off_at_every_line(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    sweep(folder_of(family), None)


def in_memory(cache: RecordCache) -> int:
    """Bytes of its slots' pages that there are."""
    libc, size = ctypes.CDLL(None, use_errno=True), 0
    for _, buffers in cache._pools:
        start, length = buffers._whole.data_ptr(), len(buffers._whole)
        found = np.zeros(-(-length // 4096), np.uint8)
        assert libc.mincore(
            ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_void_p(found.ctypes.data)
        ) == 0  # fmt: skip
        size += 4096 * int((found & 1).sum())
    return size


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="pages are counted on Linux")
@pytest.mark.parametrize("family", ["qwen3", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("size", [1 << 16, 1 << 40])
def test_memory_that_was_given_up_stays_so_after_a_broken_step(
    family: str, size: int, folder_of: Callable[[str], Path]
) -> None:
    with opened(folder_of(family)) as model:
        right = answer(model)
        model.scheduler.take(partial(model.scheduler.give_up, size, "test"))
        assert answer(model) == right
        caches = model.transformer.loaded.caches
        before = [(cache.slots, in_memory(cache)) for cache in caches]
        for place in random.Random(7).sample(places(model), BREAKS):
            broken_off(model, place)
            assert answer(model) == right
            for cache, (slots, held) in zip(caches, before, strict=True):
                assert cache.slots == slots
                assert in_memory(cache) <= max(held, slots * cache.table.header.stride), place
        live = model.transformer.memory.droppable
        assert model.transformer.memory.shrink(1 << 40) >= live
        assert answer(model) == right
        for cache in caches:
            assert in_memory(cache) <= cache.slots * cache.table.header.stride
