"""What cutting a drafter's rank leaves (experiments/drafting/mtp_rank.py)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.drafting import mtp_rank
from outsize.adapt.mtp.losses import MtpRecipe
from outsize.checkpoint import lora as adapters
from outsize.engine.model import Model
from tests.drafts import write_masks


def test_a_cut_keeps_what_the_rank_can_hold() -> None:
    """Factors of rank 6 whose product has rank 2: nothing is lost at 2, and at 1 the lesser value."""
    torch.manual_seed(3)
    left, _ = torch.linalg.qr(torch.randn(40, 2))
    right, _ = torch.linalg.qr(torch.randn(24, 2))
    mix = torch.randn(2, 6)
    b = (left * torch.tensor([4.0, 3.0])) @ mix
    a = torch.linalg.pinv(mix) @ right.T
    for rank, lost in ((2, 0.0), (1, 9 / 25)):
        small_a, small_b, share = mtp_rank.cut(a, b, rank)
        assert small_a.shape == (rank, 24)
        assert small_b.shape == (40, rank)
        error = (small_b @ small_a - b @ a).square().sum() / (b @ a).square().sum()
        assert abs(share - lost) < 1e-4
        assert abs(float(error) - lost) < 1e-4


def test_a_file_is_cut(
    open_tiny: Callable[..., Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_masks(open_tiny("llama", "auto"), tmp_path / "whole", MtpRecipe(k=3, rank=4))
    monkeypatch.setattr(sys, "argv", ["cut", str(file), str(tmp_path / "cut"), "--rank", "2"])
    mtp_rank.main()
    told = json.loads(capsys.readouterr().out)
    assert told["bytes_cut"] < told["bytes"]
    assert 0 < told["lost"] < 1
    shapes = adapters.load(tmp_path / "cut").factors().values()
    assert all(a[0] == b[1] == 2 for a, b in shapes)
