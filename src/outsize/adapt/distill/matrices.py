"""A student whose matrices learn as a whole, some of them of other shapes than the model's: what was pruned,
and layers that share keys and values. What is written, and measured, is what the encoding keeps of them.

Shapes: N rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from outsize.adapt import rewrite
from outsize.adapt.change import Change
from outsize.adapt.trainable import TrainableModel
from outsize.pack.tensors import Made

Key = tuple[int, str]  # layer and tensor: qkv, o, gate_up, down


class Matrices(Change):
    """Other matrices in place of some; `sources`: of layers that share keys and values."""

    def __init__(self, weights: Mapping[Key, Tensor], sources: Mapping[int, int]) -> None:
        self._weights, self._sources = weights, sources

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        found = self._weights.get((layer, name))
        return w if found is None else found.to(w.dtype)

    def source(self, layer: int) -> int | None:
        return self._sources.get(layer)


class MatrixStudent:
    """A `Student`."""

    use = "-m "

    def __init__(
        self,
        model: TrainableModel,
        begun: Mapping[Key, Tensor],
        encodings: Mapping[Key, str],
        kind: str,
        sources: Mapping[int, int],
    ) -> None:
        """`begun`: the matrices as training begins, fp32; `encodings`: how each will be stored."""
        self.model, self.kind, self._encodings, self._sources = model, kind, encodings, sources
        made = {key: w.to(model.device, torch.float32).clone() for key, w in begun.items()}
        self._weights = {key: w.requires_grad_() for key, w in made.items()}
        self.parameters = {f"{layer}.{name}": w for (layer, name), w in self._weights.items()}

    def change(self, step: int | None) -> Change:
        if step is not None:
            return Matrices(self._weights, self._sources)
        device = self.model.device
        stored = {
            key: rewrite.decoded(w.detach().cpu(), self._encodings[key]).to(device)
            for key, w in self._weights.items()
        }
        return Matrices(stored, self._sources)

    def about(self) -> dict[str, object]:
        return {}

    def made(self) -> dict[Key, tuple[Made, ...]]:
        """What a pack holds in place of its own."""
        out: dict[Key, tuple[Made, ...]] = {}
        for key, w in self._weights.items():
            out[key] = rewrite.encoded(w.detach().cpu(), self._encodings[key])
        return out
