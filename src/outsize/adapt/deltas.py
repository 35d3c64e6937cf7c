"""Low-rank additions to a trainable model's projections. Shapes: K inputs, N outputs, R rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from outsize.adapt.change import Change


@dataclass(frozen=True, slots=True)
class Deltas(Change):
    """Low-rank additions: y += scale * B A x for each projection, named "{layer}.{projection}"."""

    factors: Mapping[str, tuple[Tensor, Tensor]]  # A (R, K), B (N, R)
    scale: float

    def add(self, y: Tensor, x: Tensor, layer: int, names: Sequence[str]) -> Tensor:
        parts = []
        for name in names:
            a, b = self.factors[f"{layer}.{name}"]
            parts.append(linear(linear(x, a.to(x.dtype)), b.to(x.dtype)))
        return y + self.scale * (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))
