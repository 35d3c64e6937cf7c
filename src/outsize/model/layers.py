"""Linear maps over stored weights, and rotary angles.

The residual stream is fp32; what enters a linear map is in the model's type (bf16, or fp32 for an
fp32 pack). Every function treats rows alike and apart, so that a row's bits do not depend on its
neighbours (tests/laws/test_invariance.py).
Shapes: T tokens, D model width, E numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from outsize.model_config import Rope
from outsize.storage.table import Weight


class Linear:
    """y = x @ w.T for a matrix stored in one piece or several, stacked along its rows. Valid while the
    weights' memory is where it is: it is checked here, and not at each use."""

    def __init__(self, weights: tuple[Weight, ...]) -> None:
        first, *rest = ((w.encoding.product(w.fields), w.num_rows) for w in weights)
        (self._first, self._num_rows), self._rest = first, rest
        self._whole = len(weights) == 1 and not weights[0].is_padded

    def __call__(self, x_TD: Tensor, wide: bool) -> Tensor:
        y = self._first(x_TD, wide)
        if self._whole:
            return y
        rest = [product(x_TD, wide)[:, :num_rows] for product, num_rows in self._rest]
        return torch.cat([y[:, : self._num_rows], *rest], dim=1)


def apart(function: Callable[[Tensor], Tensor], x_TN: Tensor, wide: bool) -> Tensor:
    """A function of each number; unless wide row by row, since a number's last bit may depend on its place
    among all."""
    return function(x_TN) if wide else torch.cat([function(row) for row in x_TN.split(1)])


def cos_sin(rope: Rope, head_dim: int, positions_T: Tensor) -> Tensor:
    """(T, 1, E/2) complex: the rotary angle of each pair of a head, as cosine + i * sine (RoPE, arXiv
    2104.09864); 1 for pairs that do not rotate."""
    pairs, positions_T1 = rope.pairs(head_dim), positions_T.float()[:, None]
    power = torch.arange(0, 2 * pairs, 2, dtype=torch.float32, device="cpu") / max(1, 2 * pairs)
    rate = 1.0 / _base(rope, 2 * pairs, positions_T1) ** power
    if rope.divisors:
        rate = rate / torch.tensor(rope.divisors, dtype=torch.float32, device="cpu")
    angle_TP = positions_T1 * rate
    turned = torch.polar(torch.full_like(angle_TP, rope.scale), angle_TP)
    return pad(turned, (0, head_dim // 2 - pairs), value=1.0)[:, None]


def _base(rope: Rope, rotated: int, positions_T1: Tensor) -> Tensor | float:
    """Of a dynamic rope it grows with a token's position, as it does where texts are computed token by token
    (transformers' NTK scaling)."""
    if not rope.growth:
        return rope.base
    length_T1 = (positions_T1 + 1).clamp(min=float(rope.original))
    grown = rope.growth * length_T1 / rope.original - (rope.growth - 1)
    return rope.base * grown ** (rotated / (rotated - 2))


def query_growth(rope: Rope, positions: Sequence[int]) -> Tensor | None:
    """(T, 1): what queries are multiplied by (Llama 4's temperature); None: nothing."""
    shift = rope.query_shift
    if not rope.query_growth or not positions or max(positions) + shift < rope.original:
        return None
    times = torch.tensor(positions, dtype=torch.float32, device="cpu") + shift
    times = times / rope.original
    return (1 + rope.query_growth * torch.log1p(times.floor()))[:, None]
