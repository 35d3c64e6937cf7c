"""Which neurons stay, learned: a score for each, and masks of exactly k in sum that sharpen as training goes
on (Soft-Top-K, as arXiv 2407.21075 prunes with).

    mask = sigmoid((s - tau) / T),  tau such that the masks of a layer sum to k,  T falls

Shapes: F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from outsize.adapt.change import Change
from outsize.adapt.trainable import TrainableModel

WARM, COLD = 1.0, 0.05  # T at the first and at the last step, where scores begin with a spread of 1
ROUNDS = 50  # of bisection


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_F: Tensor, k: int, temperature: float) -> Tensor:
        mask_F = torch.sigmoid((score_F - threshold(score_F, k, temperature)) / temperature)
        ctx.save_for_backward(mask_F)
        ctx.temperature = temperature
        return mask_F

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """tau moves with the scores: d tau = sum(u ds) / sum(u), with u = mask (1 - mask)."""
        (mask_F,) = ctx.saved_tensors
        u_F = mask_F * (1 - mask_F)
        mean = (u_F * grads[0]).sum() / u_F.sum().clamp_min(1e-30)
        return u_F * (grads[0] - mean) / ctx.temperature, None, None


def threshold(score_F: Tensor, k: int, temperature: float) -> Tensor:
    """tau, by bisection."""
    low, high = score_F.min() - 40 * temperature, score_F.max() + 40 * temperature
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        many = torch.sigmoid((score_F - middle) / temperature).sum() > k
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    return (low + high) / 2


def soft_top_k(score_F: Tensor, k: int, temperature: float) -> Tensor:
    """Masks that sum to k; differentiable in the scores."""
    return torch.as_tensor(_SoftTopK.apply(score_F, k, temperature))  # type: ignore[no-untyped-call]


class Masked(Change):
    """The neurons of each layer, times their masks: the down map's columns."""

    def __init__(self, masks: Sequence[Tensor]) -> None:
        self._masks = masks

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        return w * self._masks[layer].to(w.dtype) if name == "down" else w


class MaskStudent:
    """A `Student` whose scores learn; the model's weights stay."""

    kind, use = "scores", ""

    def __init__(
        self, model: TrainableModel, begun: Sequence[Tensor], keep: int, steps: int
    ) -> None:
        """`begun`: what scores begin as, layer by layer: ranked, and spread evenly, so that one temperature
        fits all."""
        self.model, self._keep, self._steps = model, keep, steps
        self.parameters: Mapping[str, Tensor] = {
            f"{layer}.scores": _spread(score).to(model.device).requires_grad_()
            for layer, score in enumerate(begun)
        }

    def scores(self) -> list[Tensor]:
        return [p.detach().cpu() for p in self.parameters.values()]

    def change(self, step: int | None) -> Change:
        """Hard masks where there is no step."""
        scores = self.parameters.values()
        if step is None:
            return Masked([_hard(score.detach(), self._keep) for score in scores])
        temperature = WARM * (COLD / WARM) ** (step / max(1, self._steps - 1))
        return Masked([soft_top_k(score, self._keep, temperature) for score in scores])

    def about(self) -> dict[str, object]:
        return {}


def _spread(score_F: Tensor) -> Tensor:
    """By rank alone, from -sqrt(3) to sqrt(3): a spread of 1."""
    rank = score_F.argsort().argsort().float()
    return (2 * rank / max(1, len(rank) - 1) - 1) * 3**0.5


def _hard(score_F: Tensor, k: int) -> Tensor:
    mask = torch.zeros_like(score_F)
    mask[score_F.topk(k).indices] = 1.0
    return mask
