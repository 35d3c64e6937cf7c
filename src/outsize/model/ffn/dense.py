"""The dense feed-forward: down(act(gate(x)) * up(x)), gate and up as one matrix."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import gelu, silu

from outsize.model.layers import Linear
from outsize.model.step import Step

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "gelu": gelu,
}
NATIVE = ("silu", "gelu_tanh")  # in the order of the kinds that kernels/csrc/rows.c knows


def kind_of(activation: str) -> int:
    """The number by which kernels/csrc/rows.c knows it; -1 if it does not."""
    return NATIVE.index(activation) if activation in NATIVE else -1


SLOPE, LIMIT = 1.702, 7.0  # of gpt-oss's activation


class Biased:
    """gpt-oss's: down(clamped_swiglu(gate_up(x) + b)) + c."""

    def __init__(self, gate_up: Linear, down: Linear, gate_up_bias: Tensor, bias: Tensor) -> None:
        self.gate_up, self.down, self._gate_up_bias, self._bias = gate_up, down, gate_up_bias, bias

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        gate, up = (self.gate_up(x_TD, step.wide).float() + self._gate_up_bias).chunk(2, dim=1)
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        inner = (up + 1) * gate * (gate * SLOPE).sigmoid()
        return self.down(inner.to(x_TD.dtype), step.wide).float() + self._bias


class Dense:
    """The usual one; few families have biases, of gate and up together and of down."""

    def __init__(
        self,
        gate_up: Linear,
        down: Linear,
        activation: str,
        index: int = 0,
        biases: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.gate_up, self.down, self.activation = gate_up, down, activation
        self._layer, self._biases = index, biases
        self._act, self._kind = ACTIVATIONS[activation], kind_of(activation)

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        gate_up = step.add(self._layer, "gate_up", x_TD, self.gate_up(x_TD, step.wide))
        if self._biases is not None:
            gate_up = (gate_up + self._biases[0]).to(gate_up.dtype)
        if step.kernels is not None and self._kind >= 0:
            inner = step.kernels.gate(gate_up, self._kind)
        else:
            gate, up = gate_up.chunk(2, dim=1)
            inner = self._act(gate).mul_(up)
        out = step.add(self._layer, "down", inner, self.down(inner, step.wide))
        return out if self._biases is None else (out + self._biases[1]).to(out.dtype)
