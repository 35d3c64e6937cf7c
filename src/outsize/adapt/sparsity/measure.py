"""What a model's neurons do on a text, layer by layer: what enters each feed-forward, and how much each bundle adds.

Shapes: B sequences, S tokens of all of them, D width, F neurons, N bundles.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from outsize.adapt.statistics import States, bf16_products
from outsize.adapt.trainable import Change, TrainableModel
from outsize.model.predictors.predictor import Sample


class Activations(Change):
    """Keeps what a layer's feed-forward is given, and its bundles' energies."""

    def __init__(self, bundle: int) -> None:
        self._bundle, self._x = bundle, list[Tensor]()
        self._energy, self._up = list[Tensor](), list[Tensor]()

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        if name == "gate_up":
            self._gate, up = w.chunk(2)
            rows = x.flatten(0, 1)
            self._x.append(rows.float())
            self._up.append(linear(rows, up).float().square().mean(0))
        elif name == "down":
            self._down = w.float().norm(dim=0)
            worth = (x.flatten(0, 1).float() * self._down).square()
            self._energy.append(worth.unflatten(1, (-1, self._bundle)).sum(2))
        return w

    def sample(self, share: float) -> Sample:
        up = torch.stack(self._up).mean(0).sqrt()
        return Sample(
            torch.cat(self._x), torch.cat(self._energy), self._gate.float(), up, self._down, share
        )


def samples(
    model: TrainableModel, ids_BT: Tensor, bundle: int, share: float, done: int = 0
) -> Iterator[Sample]:
    """Of each layer from `done` on, in order: only one layer's exist at a time."""
    states = States(model, ids_BT)
    for layer in range(model.description.num_layers):
        with torch.no_grad(), bf16_products():
            if layer < done:
                states.advance()
                continue
            seen = Activations(bundle)
            states.advance(seen)
            found = seen.sample(share)
        yield found
