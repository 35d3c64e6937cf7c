"""What a model's neurons do on a text, layer by layer: what enters each feed-forward, and how much each
bundle adds.

Shapes: B sequences, S tokens of all of them, D width, F neurons, N bundles.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from outsize.adapt.change import Change
from outsize.adapt.statistics import States, bf16_products
from outsize.adapt.trainable import TrainableModel
from outsize.model.predictors.predictor import Sample


class Activations(Change):
    """Keeps what a layer's feed-forward is given, and its bundles' energies."""

    def __init__(
        self, bundle: int, gated: bool, order_F: Tensor | None, bias_F: Tensor | None
    ) -> None:
        """`bias_F`: of the gate, or, where there is none, of up."""
        self._bundle, self._gated, self._order, self._bias = bundle, gated, order_F, bias_F
        self._x, self._energy, self._up = list[Tensor](), list[Tensor](), list[Tensor]()

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        if name == "gate_up":
            both, rows = w.chunk(2) if self._gated else (w,), x.flatten(0, 1)
            self._gate = both[0]
            self._x.append(rows.float())
            if len(both) == 2:
                self._up.append(linear(rows, both[1]).float().square().mean(0))
        elif name == "down":
            self._down = w.float().norm(dim=0)
            worth = (x.flatten(0, 1).float() * self._down).square()
            worth = worth if self._order is None else worth[:, self._order]
            self._energy.append(worth.unflatten(1, (-1, self._bundle)).sum(2))
        return w

    def sample(self, share: float) -> Sample:
        """Without a gate, a neuron is worth what its activation is."""
        gate, down, bias = self._gate.float(), self._down, self._bias
        up = torch.stack(self._up).mean(0).sqrt() if self._up else torch.ones_like(down)
        if self._order is not None:
            up, gate, down = up[self._order], gate[self._order], down[self._order]
            bias = None if bias is None else bias[self._order]
        return Sample(torch.cat(self._x), torch.cat(self._energy), gate, up, down, share, bias)


class Use(Change):
    """Adds up what each neuron of each layer contributes."""

    def __init__(self) -> None:
        self.energy: dict[int, Tensor] = {}

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        if name == "down":
            worth = (x.flatten(0, 1).float() * w.float().norm(dim=0)).square().mean(0)
            self.energy[layer] = worth + self.energy.get(layer, 0.0)
        return w


def by_use(model: TrainableModel, ids_BT: Tensor) -> Tensor:
    """(L, F): each layer's neurons, those that contribute most first."""
    states, use = States(model, ids_BT), Use()
    with torch.no_grad(), bf16_products():
        for _ in range(model.description.num_layers):
            states.advance(use)
    found = [torch.argsort(use.energy[i], descending=True, stable=True) for i in sorted(use.energy)]
    return torch.stack(found)


def samples(
    model: TrainableModel,
    ids_BT: Tensor,
    bundle: int,
    share: float,
    order_LF: Tensor | None = None,
    done: int = 0,
) -> Iterator[Sample]:
    """Of each layer from `done` on, in order: only one layer's exist at a time. `order_LF`: of the
    neurons that bundles are made of."""
    states = States(model, ids_BT)
    for layer in range(model.description.num_layers):
        with torch.no_grad(), bf16_products():
            if layer < done:
                states.advance()
                continue
            order = None if order_LF is None else order_LF[layer]
            bias = model.tensors(layer).get("gate_up_bias")  # of gate, and maybe of up
            bias = None if bias is None else bias[: model.description.ffn_width]
            seen = Activations(bundle, not model.description.two_matrix, order, bias)
            states.advance(seen)
            found = seen.sample(share)
        yield found
