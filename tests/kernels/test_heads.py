"""Each head's numbers times its own matrix: compiled code equals torch, and a row's bits are its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outsize.kernels.find import native_in
from outsize.kernels.plain import PLAIN


@pytest.mark.parametrize(
    ("heads", "rows", "width"),
    [(20, 512, 192), (16, 128, 512), (3, 37, 64), (1, 5, 32), (4, 24, 24)],
)
def test_heads(heads: int, rows: int, width: int, home: Path) -> None:
    native = native_in(home / "native")
    if native is None:
        pytest.skip("no C compiler on this machine")
    torch.manual_seed(rows)
    x_THK = torch.randn(9, heads, width).bfloat16()
    w_HNK = (torch.randn(heads, rows, width) / width**0.5).bfloat16()
    ours, plain = native.heads(x_THK, w_HNK), PLAIN.heads(x_THK, w_HNK)
    exact = torch.einsum("thk,hnk->thn", x_THK.double(), w_HNK.double())
    for made in (ours, plain):
        assert torch.linalg.norm(made.double() - exact) <= 4e-3 * torch.linalg.norm(exact)
    for some in (slice(0, 1), slice(3, 5), slice(8, 9)):
        assert torch.equal(native.heads(x_THK[some], w_HNK), ours[some])
    apart = x_THK.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(native.heads(apart, w_HNK), ours)
