"""Copies of experts at fewer bits, for those that are missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import outsize
from outsize.caching import misses, prefetcher
from outsize.caching.policy import Hints, make
from outsize.caching.replay.simulate import Link, Replay, ReplaySetup
from outsize.caching.replay.trace import waves
from outsize.errors import OptionError
from outsize.pack import fetch
from outsize.weights.spec import ExpertOptions
from tests.golden import tiny
from tests.laws.test_experts import Recorded, logits, opened

SHORT = [[0, 16], [16, 30], [30, 31], [31, 32]]  # in longer ones experts are summed as they come


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_copies_of_missing_experts(family: str, folder_of: Callable[[str], Path]) -> None:
    """Copies that are the experts themselves change no bit; coarser ones do; the heaviest are fetched."""
    coarse, fine = (
        fetch.pack(str(folder_of(family)), encoding=e, quiet=True) for e in ("int8", "bf16")
    )
    whole = []
    for pack in (coarse, fine):
        with opened(pack, None, ExpertOptions()) as model:
            whole.append(logits(model, SHORT))
    expert_options = ExpertOptions(misses="copy:int8:0.9")
    with opened(coarse, 10, expert_options, coarse) as model:
        assert logits(model, SHORT).equal(whole[0])
        assert model.loaded.expert_stats.copied > 0
        assert model.loaded.expert_stats.misses > 0
    with opened(fine, 10, expert_options, coarse) as model:
        ours = logits(model, SHORT)
    assert 0 < (ours - whole[1]).norm() / whole[1].norm() < 0.4  # near ties are routed otherwise


@pytest.mark.parametrize("encoding", ["int8", "q4_0"])
def test_copies_as_a_user_asks_for_them(encoding: str, folder_of: Callable[[str], Path]) -> None:
    path, spec = str(folder_of("mixtral")), f"misses=copy:{encoding}"
    with outsize.load(path, encoding="bf16", experts=spec, context=64, quiet=True) as model:
        assert model.placement.fixed["copies of experts"] > 0
        assert model.generate("abab", raw=True, max_tokens=3)
    with pytest.raises(OptionError, match="same model and smaller"):
        outsize.load(path, encoding=encoding, experts=spec, quiet=True)
    with pytest.raises(OptionError, match="is a dense model, which has none"):
        outsize.load(str(folder_of("llama")), encoding="bf16", experts=spec, quiet=True)


def test_replayed_copies_are_counted_and_wait_less(folder_of: Callable[[str], Path]) -> None:
    recorded, seconds = Recorded(tiny.EXPERTS), []
    pack = fetch.pack(str(folder_of("olmoe")), encoding="int8", quiet=True)
    with opened(pack, None, ExpertOptions(recorder=recorded)) as model:
        logits(model)
    falling = [
        replace(e, weights=tuple(1 / (k + 1) for k in range(len(e.ids)))) for e in recorded.events
    ]
    for spec in ("fetch", "copy:int4:0.9"):
        policy = make("lru", 10, Hints(per_layer=tiny.EXPERTS, layers=tiny.LAYERS))
        setup = ReplaySetup(
            policy, 10, Link(1e9, 1 << 20), prefetcher.make("none", tiny.EXPERTS),
            misses.make(spec), tiny.EXPERTS,
        )  # fmt: skip
        found = Replay(setup).run(waves(falling, policy.room))[1]
        seconds.append(found.stats.waited_s)
        assert bool(found.stats.copied) == (spec != "fetch")
    assert seconds[1] < seconds[0]
