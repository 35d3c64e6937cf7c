"""The gate at low rank, without training (arXiv 2603.14110): the factors that are nearest to it on the
layer's own inputs, `svd:64` of rank 64."""

from __future__ import annotations

import torch
from torch import Tensor

from outsize.model.predictors.predictor import (
    Fitted,
    Maps,
    Sample,
    by_gate,
    whole_size,
    worth,
)

RANK, LEAST, MOST = 64, 16, 4096
DAMPING = 1e-3  # of the inputs' mean square, so that directions not seen count a little


def check(size: str) -> None:
    """Raises OptionError for a size that is none."""
    whole_size("svd", size, RANK, LEAST, MOST)


def fit(sample: Sample, size: str) -> Fitted:
    rank = whole_size("svd", size, RANK, LEAST, MOST)
    a_RD, b_FR = factors(sample.gate_FD, sample.x_TD, rank)
    return Fitted({"a": ("int8", a_RD), "b": ("int8", b_FR)}, worth(sample))


def factors(w_FD: Tensor, x_TD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(R, D) and (F, R) whose product is nearest to w on such inputs, in least squares."""
    moment = x_TD.T @ x_TD / len(x_TD)
    moment.diagonal().add_(DAMPING * moment.diagonal().mean())
    value, vector = torch.linalg.eigh(moment)
    root = value.clamp_min(0).sqrt().clamp_min(1e-12)
    seen_FD = w_FD @ (vector * root)
    _, turned = torch.linalg.eigh(seen_FD.T @ seen_FD)
    best = turned[:, -min(rank, w_FD.shape[1]) :]
    return (best / root[:, None]).T @ vector.T, seen_FD @ best


def scores(maps: Maps, x_TD: Tensor) -> Tensor:
    inner = maps.matrices["a"](x_TD, False)
    return by_gate(maps, maps.matrices["b"](inner, False))
