"""The experiment about sums that are coded or dropped, on a model small enough to check it whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from experiments.parallel.sync_points import Ranks, Way, measure, zero_shot
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


def test_every_way_gives_a_row(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.parallel.sync_points.find", lambda: PLAIN)
    rows: list[dict[str, Any]] = []
    texts = torch.randint(0, 128, (6, 40), generator=torch.Generator().manual_seed(1))
    measure(Ranks(tiny, 3), texts[:2], [texts[2:4], texts[4:]], 1, rows.append)
    assert [row["way"] for row in rows[:3]] == ["features", "sweep", "exact"]
    assert sorted(rows[1]["order"]) == list(range(6))
    assert len(rows) == 3 + 14
    change = {row["way"]: row["change"] for row in rows[2:]}
    assert change["exact"] == 0
    for row in rows[2:]:
        assert row["change_low"] <= row["change"] <= row["change_high"]
        assert 0 < row["top1_same"] <= 1
