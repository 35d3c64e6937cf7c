"""What long spans run on beside compiled code: torch's products, and the C functions between them."""

from __future__ import annotations

from torch import Tensor

from outsize.kernels import attention
from outsize.kernels.backend import AttentionSpec
from outsize.kernels.delta import DeltaSpec
from outsize.kernels.norm import Norm, RMSNorm
from outsize.kernels.plain import Plain
from outsize.kernels.rows import Rows
from outsize.kernels.spans import Spans


class Wide(Plain):
    """Of a compiled backend."""

    def __init__(self, native: Plain, spans: Spans) -> None:
        self._native, self._spans = native, spans

    def attend(self, spec: AttentionSpec, qkv: Tensor, cos_sin: Tensor, rows: Rows) -> Tensor:
        return attention.attend(spec, qkv, cos_sin, rows, self._spans.attend)

    def norm(self, h_TD: Tensor, norm: Norm) -> Tensor:
        return self._native.norm(h_TD, norm)

    def residual(self, h_TD: Tensor, y_TD: Tensor, post: RMSNorm | None) -> None:
        self._native.residual(h_TD, y_TD, post)

    def delta(self, spec: DeltaSpec, now: Tensor, window: Tensor, gates: Tensor) -> Tensor:
        return self._native.delta(spec, now, window, gates)

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        return self._native.gate(gate_up, activation)
