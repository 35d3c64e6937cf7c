"""Sync-Point Drop (Kim et al., arXiv 2502.20727): layers whose attention is not summed over ranks.

In a layer so chosen each rank keeps its own part P_i of attention's output, feeds its feed-forward with its
own guess of the state, and sends one message instead of two:

    H_i = X + P_i + b_o + c_i                # c_i: what the others' parts are likely to be; 0 in the paper
    M_i = P_i + FFN_i(norm(H_i))             # sent and summed over ranks
    X  += sum of M_i + b_o + b_2             # biases once

What leaves the layer is the same on all ranks, and holds the exact attention; only what the feed-forward saw
was a guess. A correction c_i is linear in what the rank knows, [norm(X), P_i, 1], of low rank, and fitted in
closed form to the others' sum (ridge regression on calibration data).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from outsize.errors import UnsupportedError

RIDGE = 1e-3  # of the mean of the Gram matrix's diagonal


@dataclass(frozen=True)
class Correction:
    """c_i = [norm(X), P_i, 1] @ first @ second: (2D + 1, r) and (r, D), of one rank and layer."""

    first: Tensor
    second: Tensor

    def __call__(self, normed_TD: Tensor, part_TD: Tensor) -> Tensor:
        """(T, D) fp32."""
        return known(normed_TD, part_TD) @ self.first.float() @ self.second.float()


@dataclass(frozen=True)
class Drop:
    """The layers whose attention is not summed, and this rank's corrections, of any of them."""

    layers: frozenset[int] = frozenset()
    corrections: Mapping[int, Correction] = field(default_factory=dict)

    def __contains__(self, layer: int) -> bool:
        return layer in self.layers

    def guess(self, layer: int, x_TD: Tensor, part_TD: Tensor, normed_TD: Tensor) -> Tensor:
        """H_i but for biases: (T, D) fp32. `normed_TD`: what attention was computed from."""
        return x_TD.float() + self.attention(layer, part_TD, normed_TD)

    def attention(
        self, layer: int, part_TD: Tensor, normed_TD: Tensor, apart: bool = False
    ) -> Tensor:
        """P_i + c_i: (T, D) fp32. `apart`: each row as if alone."""
        correction = self.corrections.get(layer)
        if correction is None:
            return part_TD.float()
        if not apart:
            return part_TD.float() + correction(normed_TD, part_TD)
        rows = zip(normed_TD.split(1), part_TD.split(1), strict=True)
        return part_TD.float() + torch.cat([correction(x, p) for x, p in rows])


NO_DROP = Drop()


def message(part_TD: Tensor, ffn_TD: Tensor) -> Tensor:
    """M_i: added in fp32, rounded to the parts' dtype."""
    return (part_TD.float() + ffn_TD.float()).to(part_TD.dtype)


def check(layer: int, *, mixture: bool, post_norm: bool, num_layers: int) -> None:
    """Raise UnsupportedError for a layer whose sums cannot be left out."""
    if not 0 <= layer < num_layers:
        raise UnsupportedError(
            f"layer {layer} cannot be dropped: there are layers 0 to {num_layers - 1}"
        )
    if mixture:
        raise UnsupportedError(
            f"the sum after attention of layer {layer} cannot be dropped: it has experts, and each "
            "rank would choose them by a guess of its own"
        )
    if post_norm:
        raise UnsupportedError(
            f"the sum after attention of layer {layer} cannot be dropped: a norm follows it, and the "
            "norm of a sum is not the sum of norms"
        )


def known(normed_TD: Tensor, part_TD: Tensor) -> Tensor:
    """(T, 2D + 1) fp32: what a rank knows."""
    ones = torch.ones(len(part_TD), 1, dtype=torch.float32, device="cpu")
    return torch.cat([normed_TD.float(), part_TD.float(), ones], dim=1)


class Fit:
    """Of one rank and layer's correction: give it calibration data, then ask for the correction."""

    def __init__(self, width: int) -> None:
        size = 2 * width + 1
        self._gram = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        self._cross = torch.zeros(size, width, dtype=torch.float64, device="cpu")

    def add(self, normed_TD: Tensor, part_TD: Tensor, others_TD: Tensor) -> None:
        """`others_TD`: the sum of the other ranks' parts, which is to be guessed."""
        f = known(normed_TD, part_TD)
        self._gram += f.T @ f
        self._cross += f.T @ others_TD.float()

    def solve(self, rank: int, ridge: float = RIDGE) -> Correction:
        """The best map of at most `rank` dimensions: ridge regression's, cut to the directions in which what
        it guesses varies most."""
        size = len(self._gram)
        eye = torch.eye(size, dtype=torch.float64, device="cpu")
        weight = ridge * float(self._gram.trace()) / size
        whole = torch.linalg.solve(self._gram + weight * eye, self._cross)
        varies = whole.T @ self._gram @ whole
        _, vectors = torch.linalg.eigh(varies)  # ascending
        second = vectors[:, -rank:].T.contiguous()
        return Correction((whole @ second.T).float(), second.float())
