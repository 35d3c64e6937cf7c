"""The experiment about sums that are coded or dropped, on a model small enough to check it whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.parallel.simulated import Ranks, Way, zero_shot
from experiments.parallel.sync_points import Rows, measure, within
from outsize.kernels.plain import PLAIN


@pytest.fixture
def tiny() -> Iterator[Any]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=192, intermediate_size=192, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=3, head_dim=32, attn_implementation="eager",
    )  # fmt: skip
    with torch.no_grad():
        yield transformers.LlamaForCausalLM(config).eval()


def test_the_cut_model_is_the_model(tiny: Any) -> None:
    ids = torch.arange(50) * 7 % 128
    wanted = tiny(ids[None]).logits[0]
    ranks = Ranks(tiny, 3)
    got = ranks.logits(ids, Way("exact"))
    assert torch.allclose(got, wanted, atol=0.02)  # parts in bf16
    assert torch.allclose(got.softmax(1), wanted.softmax(1), atol=1e-3)
    alone = Ranks.logits(ranks, ids, Way("dropped", drops=zero_shot(range(6), 3)))
    assert not torch.allclose(alone, wanted, atol=1e-4)


def test_every_way_gives_a_row(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.parallel.sync_points.find", lambda: PLAIN)
    texts = torch.randint(0, 128, (6, 40), generator=torch.Generator().manual_seed(1))
    out = tmp_path / "rows.jsonl"
    measure(Ranks(tiny, 3), texts[:2], [texts[2:4], texts[4:]], 1, Rows(out, {"model": "tiny"}))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["way"] for row in rows[:3]] == ["exact", "sweep", "features"]
    assert len(rows) == 3 + 18
    assert rows[0]["change"] == 0
    for row in rows[:1] + rows[3:]:
        assert row["change_low"] <= row["change"] <= row["change_high"]
        assert 0 < row["top1_same"] <= 1
    gone_on = Rows(out, {"model": "tiny"})
    assert gone_on.get("exact", dict) == rows[0], "what is there is not measured again"
    assert not Rows(out, {"model": "other"}).known


def test_layers_within_the_gate() -> None:
    rises = [0.004, 0.1, -0.1, 0.005, 0.002]
    assert within([2, 4, 0, 3, 1], rises) == 3
    assert within([2], rises) == 1


def test_heads_in_another_order(tiny: Any) -> None:
    """With all sums taken the order changes roundings alone; with some left out it matters."""
    ids = torch.arange(50) * 7 % 128
    ranks = Ranks(tiny, 3)
    ways = Way("exact"), Way("dropped", drops=zero_shot(range(6), 3))
    before = [ranks.logits(ids, way) for way in ways]
    ranks.orders = dict.fromkeys(range(6), (2, 0, 1))
    after = [ranks.logits(ids, way) for way in ways]
    assert torch.allclose(before[0], after[0], atol=0.02)
    assert not torch.allclose(before[1], after[1], atol=1e-4)
