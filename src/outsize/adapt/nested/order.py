"""In which order a layer's neurons are worth computing: by how much each adds on a text.

Shapes: B sequences, T tokens, L layers, F neurons.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from outsize.adapt.change import Change
from outsize.adapt.head_loss import head_loss
from outsize.adapt.statistics import AT_ONCE, States, bf16_products, causal
from outsize.adapt.trainable import TrainableModel
from outsize.errors import OptionError

# Mean |h| times the norm of down's column; mean |h|; mean |h dL/dh| (first-order Taylor of the loss).
SCORES = "norm", "plain", "taylor"


class Size(Change):
    """Adds up |h|, times the norm of down's column where that counts."""

    def __init__(self, normed: bool) -> None:
        self._normed, self.sums = normed, dict[int, Tensor]()

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        if name == "down":
            size = x.flatten(0, 1).float().abs().mean(0)
            size = size * w.float().norm(dim=0) if self._normed else size
            self.sums[layer] = size + self.sums.get(layer, 0.0)
        return w


class Taylor(Change):
    """Adds up |h dL/dh| while gradients go backward."""

    def __init__(self) -> None:
        self.sums = dict[int, Tensor]()

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        if name == "down":
            x.register_hook(partial(self._see, layer, x.detach()))
        return w

    def _see(self, layer: int, x: Tensor, g: Tensor) -> None:
        size = (x.float() * g.float()).flatten(0, 1).abs().sum(0)
        self.sums[layer] = size + self.sums.get(layer, 0.0)


def by_importance(model: TrainableModel, ids_BT: Tensor, score: str, block: int = 1) -> Tensor:
    """(L, F): each layer's neurons, the most important first; in blocks of so many neighbours. Raises
    OptionError."""
    if score not in SCORES:
        raise OptionError(f"importance is {score!r}; known are {', '.join(SCORES)}")
    sums = _taylor(model, ids_BT) if score == "taylor" else _sizes(model, ids_BT, score == "norm")
    worth_LF = torch.stack([sums[i] for i in sorted(sums)])
    blocks = worth_LF.unflatten(1, (-1, block)).sum(2)
    first = blocks.argsort(dim=1, descending=True, stable=True) * block
    step = torch.arange(block, dtype=torch.int64, device="cpu")
    order_LF: Tensor = (first[:, :, None] + step).flatten(1)
    return order_LF


def _sizes(model: TrainableModel, ids_BT: Tensor, normed: bool) -> dict[int, Tensor]:
    states, seen = States(model, ids_BT), Size(normed)
    with torch.no_grad(), bf16_products():
        for _ in range(model.description.num_layers):
            states.advance(seen)
    return seen.sums


def _taylor(model: TrainableModel, ids_BT: Tensor) -> dict[int, Tensor]:
    seen = Taylor()
    for ids in ids_BT.split(max(1, AT_ONCE // ids_BT.shape[1])):
        rows = causal(model.embed(ids).requires_grad_())
        x, _ = model.run(rows, change=seen)
        states = x[:, :-1].flatten(0, 1).to(model.dtype)
        loss = head_loss(states, ids[:, 1:].flatten(), model.head_VD)
        torch.autograd.backward([loss])
    return seen.sums
