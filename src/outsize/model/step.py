"""What every sub-layer is told of one step: whose rows it runs, at which rotary angles, on which backend.

A step is one call of the model for some rows: a few (a token, a draft, a batch), each computed as if alone,
or a chunk of one long span, computed as matmuls ("wide").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from outsize.kernels.backend import AttentionSpec, Backend
from outsize.kernels.norm import RMSNorm
from outsize.kernels.rows import Rows
from outsize.model.lora import Adapter
from outsize.model.width import Width
from outsize.model_config import Rope
from outsize.weights.tokens import Recalled


class Watch(Protocol):
    """Looks at what some rows of a step attend to, in some layers."""

    @property
    def rows(self) -> slice: ...

    def is_for(self, layer: int) -> bool: ...

    def see(self, spec: AttentionSpec, qkv_RN: Tensor, cos_sin: Tensor) -> None:
        """The rows' projections, which are its own to change, and rotary angles; keys are stored."""
        ...


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What a step's tokens bring, whatever stands around them: their embeddings (T, D), fp32, or their rows
    of a table that layers look up (weights/tokens.py)."""

    embedded_TD: Tensor | None = None
    recalled: Recalled | None = None


class Held(NamedTuple):
    """What attention read (T, D), this rank's part of what it made of that (T, D), and the whole's bias."""

    normed_TD: Tensor
    part_TD: Tensor
    bias_D: Tensor | None


@dataclass(frozen=True, slots=True)
class Step:
    """One step. Shapes: T rows, D model width, K inputs, N outputs, E numbers a head."""

    rows: Rows
    cos_sin: Mapping[Rope, Tensor]  # rotary angles (T, 1, E/2), complex, for each kind of rope
    backend: Backend  # in wide steps its `wide`
    added: Sequence[tuple[slice, Adapter]] = ()  # rows that an adapter adds to
    watches: Sequence[Watch] = ()
    tokens: TokenInputs | None = None  # of a model whose layers read them
    widths: Sequence[tuple[slice, Width]] = ()  # rows of less than whole feed-forwards, in order
    # What a layer's attention read (T, D), normed, where its feed-forward reads the same.
    read: list[Tensor] = field(default_factory=list)
    # Of a layer whose attention is not summed over ranks, until its feed-forward has it.
    held: list[Held] = field(default_factory=list)

    @property
    def wide(self) -> bool:
        return self.rows.wide

    def add(self, layer: int, name: str, x_TK: Tensor, y_TN: Tensor) -> Tensor:
        """y with what adapters add to this linear map of x; changed in place."""
        if not self.added:
            return y_TN
        x_TK, y_TN = x_TK.contiguous(), y_TN.contiguous()
        for rows, adapter in self.added:
            factors = adapter.factors(layer, name)
            if factors is not None:
                self.backend.lowrank(factors, x_TK, y_TN, rows, self.wide)
        return y_TN

    def residual(
        self,
        h_TD: Tensor,
        y_TD: Tensor,
        post: RMSNorm | None = None,
        bias_D: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        """h += scale * post(y + bias), in place: every sub-layer's output passes here. Where several ranks
        each hold a part of a sub-layer's weights, y is a partial sum, and here, before anything else, is the
        place to add them up."""
        if bias_D is not None:
            y_TD = (y_TD + bias_D).to(y_TD.dtype)
        if scale != 1.0:
            y_TD = y_TD.float() if post is None else post(y_TD.float())
            y_TD, post = y_TD * scale, None
        self.backend.residual(h_TD, y_TD, post)
