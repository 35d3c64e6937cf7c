"""How far changed weights take a model's predictions from its own."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from outsize.adapt.trainable import TrainableModel

ROWS = 64  # predictions compared at once: logits of a large vocabulary are big


class Divergence(NamedTuple):
    """Means over the predictions of a text."""

    kl: float  # of the former ones from the new ones, in nats
    top1: float  # share with the same likeliest token
    perplexity: float
    former_perplexity: float


def following(ids_BT: Tensor) -> Tensor:
    """(B, T): the token after each of some sequences'; -1, which is unknown, after the last."""
    return pad(ids_BT[:, 1:], (0, 1), value=-1)


@torch.inference_mode()
def divergence(
    model: TrainableModel, former_TD: Tensor, new_TD: Tensor, next_T: Tensor
) -> Divergence:
    """Of normed states, each with the token that follows (negative: unknown)."""
    kl = same = nll = former_nll = 0.0
    for a, b, target in zip(
        former_TD.split(ROWS), new_TD.split(ROWS), next_T.split(ROWS), strict=True
    ):
        p, q = (model.logits(x).float().log_softmax(dim=1) for x in (a, b))
        kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        same += int((p.argmax(dim=1) == q.argmax(dim=1)).sum())
        known = target >= 0
        former_nll += float(cross_entropy(p[known], target[known], reduction="sum"))
        nll += float(cross_entropy(q[known], target[known], reduction="sum"))
    count, known_count = len(next_T), max(1, int((next_T >= 0).sum()))
    return Divergence(
        kl / count,
        same / count,
        math.exp(nll / known_count),
        math.exp(former_nll / known_count),
    )
