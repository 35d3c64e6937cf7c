"""What cutting a drafter's rank leaves (bench/masks_rank.py)."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "masks_rank.py"))


def test_a_cut_keeps_what_the_rank_can_hold() -> None:
    """Factors of rank 6 whose product has rank 2: nothing is lost at 2, and at 1 the lesser value."""
    torch.manual_seed(3)
    left, _ = torch.linalg.qr(torch.randn(40, 2))
    right, _ = torch.linalg.qr(torch.randn(24, 2))
    mix = torch.randn(2, 6)
    b = (left * torch.tensor([4.0, 3.0])) @ mix
    a = torch.linalg.pinv(mix) @ right.T
    for rank, lost in ((2, 0.0), (1, 9 / 25)):
        small_a, small_b, share = SCRIPT["cut"](a, b, rank)
        assert small_a.shape == (rank, 24)
        assert small_b.shape == (40, rank)
        error = (small_b @ small_a - b @ a).square().sum() / (b @ a).square().sum()
        assert abs(share - lost) < 1e-4
        assert abs(float(error) - lost) < 1e-4
