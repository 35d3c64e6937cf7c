"""What a live picture is told of the weights: every byte and every request, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from outsize.engine.model import Model
from outsize.errors import ClosedError
from outsize.report.weights_now import ABSENT, COLD, HIT, THERE, WeightsNow

PROMPT = "a b c"


def _parts(model: Model) -> list[dict[str, Any]]:
    return WeightsNow(model).parts()


def test_resident_weights_are_held_and_never_read(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny("llama")
    now = WeightsNow(model)
    model.generate(PROMPT, max_tokens=3)
    seen: dict[str, Any] = now.look()
    assert set(seen["held"]) == {1.0}
    assert sum(seen["read_bytes"]) == 0
    assert (seen["hits"] > 0, seen["misses"]) == (True, 0)
    assert {part["tier"] for part in _parts(model)} == {"memory"}


def test_parts_are_the_packs_tables(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny("llama")
    parts, d = _parts(model), model.pack.description
    layers = [part["layer"] for part in parts if part["part"] == "feed-forward"]
    assert layers == list(range(d.num_layers))
    sizes = sum(t.size for t in model.pack.tables if t.name != "final-0")
    assert sum(part["bytes"] for part in parts) == sizes


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("native", [False, True])
def test_bytes_are_those_that_were_read(
    open_paged: Callable[..., Model], family: str, native: bool
) -> None:
    model = open_paged(family, native=native)
    now, before = WeightsNow(model), model.bytes_read
    model.generate(PROMPT, max_tokens=3, ignore_eos=True)
    seen: dict[str, Any] = now.look()
    assert sum(seen["read_bytes"]) == model.bytes_read - before > 0
    parts = zip(now.parts(), seen["read_bytes"], seen["held"], strict=True)
    for part, size, held in parts:
        if part["part"] in ("attention", "feed-forward"):
            assert part["tier"] == ("memory" if held else "disk")
            assert (size > 0) == (held == 0)
    assert sum(now.look()["read_bytes"]) == model.bytes_read - before - sum(seen["read_bytes"])  # type: ignore[call-overload]


def test_experts_are_told_by_what_became_of_them(open_paged: Callable[..., Model]) -> None:
    model = open_paged("qwen3_moe")
    now = WeightsNow(model)
    model.generate(PROMPT, max_tokens=8, ignore_eos=True)
    seen: dict[str, Any] = now.look()
    asked = model.counts().experts
    assert (seen["hits"], seen["misses"]) == (asked.hits, asked.misses)
    letters = "".join(seen["experts"])
    mixture = model.pack.description.mixture
    assert mixture is not None
    assert len(letters) == mixture.count * model.pack.description.num_layers
    assert COLD in letters
    assert set("".join(now.look()["experts"])) <= {ABSENT, THERE}, "nothing was asked for since"  # type: ignore[call-overload]
    for bank in model.transformer.loaded.banks:
        kinds = bank.cache.outcomes
        counted = [sum(k) for k in (kinds.hits, kinds.ready, kinds.late, kinds.missed)]
    assert counted[0] == asked.hits
    assert counted[1:3] == [asked.ready, asked.late]
    assert counted[3] == asked.cold + asked.capacity + asked.collision
    assert set(letters) & {HIT, COLD}


def test_a_closed_model_is_said(open_paged: Callable[..., Model]) -> None:
    model = open_paged("llama")
    now = WeightsNow(model)
    model.close()
    with pytest.raises(ClosedError):
        now.look()
