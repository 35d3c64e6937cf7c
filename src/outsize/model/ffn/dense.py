"""The dense feed-forward: down(act(gate(x)) * up(x)), gate and up as one matrix (SwiGLU, arXiv
2002.05202); or, before 2023, down(act(up(x)))."""

from __future__ import annotations

import torch
from torch import Tensor

from outsize.kernels.plain import activation_of
from outsize.model.joint import ALONE, Joint
from outsize.model.layers import Linear
from outsize.model.step import Step

SLOPE, LIMIT = 1.702, 7.0  # of gpt-oss's activation


class Biased:
    """One of gpt-oss's experts: down(clamped_swiglu(gate_up(x) + b)) + c."""

    def __init__(self, gate_up: Linear, down: Linear, gate_up_bias: Tensor, bias: Tensor) -> None:
        self.gate_up, self.down, self._gate_up_bias, self._bias = gate_up, down, gate_up_bias, bias

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        gate, up = (self.gate_up(x_TD, step.wide).float() + self._gate_up_bias).chunk(2, dim=1)
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        inner = (up + 1) * gate * (gate * SLOPE).sigmoid()
        return self.down(inner.to(x_TD.dtype), step.wide).float() + self._bias


class Dense:
    """The usual one; few families have a bias of gate and up. (That of down is the sub-layer's.)"""

    def __init__(
        self,
        maps: tuple[Linear, Linear],
        activation: str,
        index: int = 0,
        bias: Tensor | None = None,
        joint: Joint = ALONE,
    ) -> None:
        """`maps`: gate and up, and down; of several ranks each has its part."""
        self._gate_up, self._down = maps
        self._activation, self._layer, self._bias, self._joint = activation, index, bias, joint

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        gate_up = step.add(self._layer, "gate_up", x_TD, self._gate_up(x_TD, step.wide))
        if self._bias is not None:
            gate_up = (gate_up + self._bias).to(gate_up.dtype)
        inner = self._joint.inner(self._inner(gate_up, step))
        return step.add(self._layer, "down", inner, self._down(inner, step.wide))

    def _inner(self, gate_up: Tensor, step: Step) -> Tensor:
        return step.backend.gate(gate_up, self._activation)


class Ungated(Dense):
    """Of two matrices: what is called `gate_up` is up alone."""

    def _inner(self, gate_up: Tensor, step: Step) -> Tensor:
        return activated(gate_up, self._activation)


def activated(up_TF: Tensor, activation: str) -> Tensor:
    """activation(up), each row as if alone: torch's rounding depends on where in memory a number lies."""
    function = activation_of(activation)
    return torch.cat([function(row) for row in up_TF.split(1)])
