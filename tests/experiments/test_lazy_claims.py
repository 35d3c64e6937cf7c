"""What the measurements of lazy prefill stand on: ways of running a prompt that only they have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.quality import lazy_ways
from experiments.quality.lazy import has
from experiments.quality.lazy_summary import interval, summary
from outsize.engine.model import Model
from tests.golden import tiny

RAW = Path(__file__).parents[2] / "experiments" / "results" / "xeon-2core"
PROMPT = tiny.TOKENS


@pytest.mark.parametrize("mode", ["once", "drop", "revive"])
def test_each_mode_made_of_one_prompt_is_that_mode(
    mode: str, open_tiny: Callable[..., Model]
) -> None:
    t, way = open_tiny("llama", "fp32").transformer, "lazy:keep=.6/.3,after=.3/.67,mode="
    made = dict(lazy_ways.by_mode(lazy_ways.first(t, PROMPT, way + "revive")))
    ours, alone = (
        made["" if mode == "once" else f", {mode}"],
        lazy_ways.first(t, PROMPT, way + mode),
    )
    assert ours.share == alone.share < 1
    assert ours.kv.positions == alone.kv.positions
    for token in (3, 5):
        (x,), (y,) = (lazy_ways.step(t, [one], [token], token - 3) for one in (ours, alone))
        assert torch.equal(x, y)


def test_all_tokens_through_all_layers_are_the_full_pass(open_tiny: Callable[..., Model]) -> None:
    t = open_tiny("llama", "fp32").transformer
    layers = len(t.paged_layers) // 2
    h_TD, seen = lazy_ways.passed(t, t.new_kv(), PROMPT, range(len(PROMPT)), (layers, 2))
    assert torch.equal(t.logits(h_TD[-1:])[0], lazy_ways.first(t, PROMPT, "full").logits_V)
    assert [float(s.sum()) for s in seen.shares] == pytest.approx([1.0] * layers)


@pytest.mark.parametrize("way", ["random:.5", "early:.4/.5"])
def test_tokens_chosen_before_the_model(
    way: str, open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run at their own positions, and what chose them counts as computed."""
    monkeypatch.setattr(lazy_ways, "TAIL", 5)
    t, n = open_tiny("llama", "fp32").transformer, len(PROMPT)
    begun = lazy_ways.first(t, PROMPT, way)
    kept = list(begun.kv.positions[0])
    assert len(kept) == round(0.5 * n)
    assert {*range(lazy_ways.SINKS), *range(n - 5, n)} <= set(kept)
    layers = len(begun.kv.positions)
    scored = round(0.4 * layers) / layers if way.startswith("early") else 0
    assert begun.share == pytest.approx(scored + len(kept) / n)
    (after,) = lazy_ways.step(t, [begun], [7], 0)
    assert begun.kv.length == n + 1
    assert after.isfinite().all()


def test_answers_are_found() -> None:
    assert has("It was the Röntgen, W.", ["x", "Röntgen W"])
    assert not has("Röntgenstein", ["Röntgen"])


def test_an_interval_is_of_the_mean() -> None:
    found = interval([0.0] * 50 + [1.0] * 50)
    assert found["mean"] == 0.5
    assert (found["low"], found["high"]) == (
        pytest.approx(0.4, abs=0.03),
        pytest.approx(0.6, abs=0.03),
    )


@pytest.mark.parametrize(
    ("model", "name"), [("smollm2", "lazy-summary"), ("qwen", "lazy-summary-qwen")]
)
def test_the_summary_is_of_its_rows(model: str, name: str) -> None:
    files = sorted(path for path in RAW.glob(f"lazy-*-{model}.jsonl") if path.stem != name)
    kept = (RAW / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(json.dumps(row)) for row in summary(files)] == [
        json.loads(line) for line in kept
    ]
