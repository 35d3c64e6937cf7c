"""What a run of a trainable model does otherwise than the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn.attention import SDPBackend

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

    def ffn(self, x: Tensor, h: Tensor, layer: int, whole: Callable[[], Tensor]) -> Tensor:
        """A layer's feed-forward of x; h is the stream that it is added to, `whole` the model's own."""
        return whole()

    def inner(self, gate_up: Tensor, d: Description) -> Tensor:
        """What a feed-forward's `down` multiplies."""
        function = activation_of(d.activation)
        if d.two_matrix:
            return function(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return function(gate) * up


AS_IS = Change()
