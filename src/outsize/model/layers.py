"""The arithmetic of a block: linear maps over stored weights, norms, rotary positions.

The residual stream is fp32; what enters a linear map is in the model's type (bf16, or fp32 for an
fp32 pack). Every function treats rows alike and apart, so that a row's bits do not depend on its
neighbours (tests/laws/test_invariance.py).
Shapes: T tokens, D model width, H heads (query and key heads together where it says so), E numbers a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from outsize.model_config import Rope
from outsize.storage.table import Weight


class Linear:
    """y = x @ w.T for a matrix stored in one piece or several, stacked along its rows."""

    def __init__(self, weights: tuple[Weight, ...]) -> None:
        self.weights = weights
        self._first = weights[0]
        self._whole = len(weights) == 1 and not self._first.is_padded

    def __call__(self, x_TD: Tensor, wide: bool) -> Tensor:
        first = self._first
        y = first.encoding.linear(x_TD, first.fields, wide)
        if self._whole:
            return y
        rest = [w.encoding.linear(x_TD, w.fields, wide)[:, : w.num_rows] for w in self.weights[1:]]
        return torch.cat([y[:, : first.num_rows], *rest], dim=1)


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis, in fp32.

    Written as x / hypot(|x|, sqrt(n * eps)) * (sqrt(n) * weight): the same number in small operations;
    torch's rms_norm takes twice as long on one row.
    """

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype) -> None:
        width = weight.shape[-1]
        self.weight, self.eps = weight.contiguous(), eps
        self._weight = weight * math.sqrt(width)
        self._floor = torch.tensor(math.sqrt(width * eps), dtype=torch.float32, device="cpu")
        self._dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._floor)
        return torch.div(x, norm).mul_(self._weight).to(self._dtype)


def turns(rope: Rope, head_dim: int, positions_T: Tensor) -> Tensor:
    """(T, 1, E/2) complex: how far each pair of each token's heads turns."""
    half = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    rate = 1.0 / rope.base ** (half / head_dim)
    if rope.divisors:
        rate = rate / torch.tensor(rope.divisors, dtype=torch.float32, device="cpu")
    angle_TP = positions_T.float()[:, None] * rate
    return torch.polar(torch.full_like(angle_TP, rope.scale), angle_TP)[:, None]


def rotate(heads_THE: Tensor, turns_T1P: Tensor) -> Tensor:
    """Turn adjacent pairs. fp32; changes its input where its layout allows."""
    pairs = torch.view_as_complex(heads_THE.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(turns_T1P)).flatten(-2)
