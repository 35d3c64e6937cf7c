"""What a run of a trainable model does otherwise than the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import linear

from outsize.kernels.plain import activation_of
from outsize.model_config import Description
from outsize.pack.records import POSITIONS

LAST = ("final_norm", POSITIONS)  # of a model's last record, what training reads
ROWS = 4096  # of a row table decoded at once
# Not cuDNN's: its gradients are NaN for some heads with large scores (Qwen2.5 on an H100, torch 2.11).
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Stored = tuple[Tensor, Tensor]  # one layer's keys and values, (B, J, S, E) each


class Change:
    """What a run does otherwise than the model: here, nothing."""

    __slots__ = ()

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        """What multiplies x in place of w, a tensor of a pack's record: qkv, o, gate_up or down."""
        return w

    def source(self, layer: int) -> int | None:
        """The earlier layer whose keys and values this one reads, making queries alone; None: its own."""
        return None

    def vector(self, v: Tensor, layer: int, name: str) -> Tensor:
        """What scales normed states in place of v, a norm before a sub-layer: attn_norm or ffn_norm."""
        return v

    def add(self, y: Tensor, x: Tensor, layer: int, names: Sequence[str]) -> Tensor:
        """`y` is the product of x with the projections' rows, stacked; with what is added."""
        return y

    def inner(self, gate_up: Tensor, d: Description) -> Tensor:
        """What a feed-forward's `down` multiplies."""
        function = activation_of(d.activation)
        if d.two_matrix:
            return function(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return function(gate) * up


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


AS_IS = Change()
