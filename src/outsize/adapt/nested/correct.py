"""Low-rank corrections in closed form: of what a width leaves out, the part that a map of rank R of the same
input predicts best, in least squares (reduced-rank regression).

Shapes: N tokens, D width of the stream, R rank, M widths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from outsize.adapt.nested.prefixes import Ffn, Prefixes
from outsize.adapt.statistics import bf16_products, causal
from outsize.adapt.trainable import TrainableModel

DAMP = 0.05  # of the mean of the diagonal of inputs' second moments


class _Gaps(Prefixes):
    """Goes on with the whole, and fits a correction of each width."""

    def __init__(self, model: TrainableModel, ffns: list[Ffn], ends: list[int], rank: int) -> None:
        super().__init__(model, ffns, ends, lambda layer, x, error: x)
        self._rank, self.found = rank, list[tuple[Tensor, Tensor, Tensor]]()

    def ffn(self, x: Tensor, h: Tensor, layer: int, whole: Callable[[], Tensor]) -> Tensor:
        sums = self.sums(x, layer)
        x_ND = x.flatten(0, 1).float()
        mean_D = x_ND.mean(0)
        away = x_ND - mean_D
        moment_DD = away.T @ away
        for s in sums[:-1]:
            gap_ND = (sums[-1] - s).flatten(0, 1)
            self.found.append(fit(moment_DD, away.T @ gap_ND, (mean_D, gap_ND.mean(0)), self._rank))
        return sums[-1]


def fit(
    moment_DD: Tensor, product_DD: Tensor, means: tuple[Tensor, Tensor], rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """a (R, D), b (D, R), c (D): gap ~ b (a x) + c, of second moments of inputs, and products of inputs with
    gaps, both about their means."""
    damped = moment_DD.clone()
    damped.diagonal().add_(DAMP * float(damped.diagonal().mean()))
    values, vectors = torch.linalg.eigh(damped)
    root = vectors * values.clamp_min(1e-12).rsqrt() @ vectors.T  # of the inverse
    u, s, v = torch.linalg.svd(root @ product_DD, full_matrices=False)
    size = s[:rank].sqrt()
    a_RD = (root @ u[:, :rank] * size).T
    b_DR = v[:rank].T * size
    mean_D, gap_D = means
    return a_RD.contiguous(), b_DR.contiguous(), gap_D - b_DR @ (a_RD @ mean_D)


@torch.no_grad()
def closed_form(
    model: TrainableModel, ffns: list[Ffn], ends: list[int], rank: int, ids_BT: Tensor
) -> dict[str, Tensor]:
    """a (L, M - 1, R, D), b (L, M - 1, D, R) and c (L, M - 1, D)."""
    seen = _Gaps(model, ffns, ends, rank)
    with bf16_products():
        model.run(causal(model.embed(ids_BT)), change=seen)
    shape = model.description.num_layers, len(ends) - 1
    parts = zip(("a", "b", "c"), zip(*seen.found, strict=True), strict=True)
    return {name: torch.stack(some).unflatten(0, shape) for name, some in parts}
