"""Feed-forwards of the token's embedding (MemoryLLM, arXiv 2602.00398): computed, or looked up in a table
with a row for each token. Both add to the residual stream what depends on the token alone.

Law: a table in 16 bits gives the bits of computing, row by row, over the whole vocabulary
(tests/laws/test_memory.py).
Shapes: T rows, D model width, R numbers of a row of a layer's table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outsize.kernels.norm import RMSNorm
from outsize.model.ffn.dense import Dense
from outsize.model.layers import Linear
from outsize.model.step import Step

Contribution = Callable[[Step], Tensor]  # (T, D): what a step's tokens add in a layer


class Computed:
    """feed_forward(norm(embedding))."""

    def __init__(self, norm: RMSNorm, dense: Dense) -> None:
        self._norm, self._dense = norm, dense

    def __call__(self, step: Step) -> Tensor:
        embedded_TD = None if step.tokens is None else step.tokens.embedded_TD
        assert embedded_TD is not None
        return self.of(embedded_TD, step)

    def of(self, x_TD: Tensor, step: Step) -> Tensor:
        """The same of given embeddings (T, D), fp32."""
        return self._dense(step.backend.norm(x_TD, self._norm), step)


class LookedUp:
    """A layer's numbers of each token's row, or what its basis makes of them in activations' type."""

    def __init__(self, layer: int, basis: Linear | None, dtype: torch.dtype) -> None:
        self._layer, self._basis, self._dtype = layer, basis, dtype

    def __call__(self, step: Step) -> Tensor:
        recalled = None if step.tokens is None else step.tokens.recalled
        assert recalled is not None
        row_TR = recalled.numbers(self._layer)
        if self._basis is None:
            return row_TR
        return self._basis(row_TR.to(self._dtype), step.wide)


class MemorySubLayer:
    """h += dense(h), where there is one, and then what the tokens themselves add. `memory` None: it is left
    out (lossy)."""

    def __init__(
        self, dense: Callable[[Tensor, Step], None] | None, memory: Contribution | None
    ) -> None:
        self._dense, self.memory = dense, memory

    def run(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        for h_TD, step in chunks:
            if self._dense is not None:
                self._dense(h_TD, step)
            if self.memory is not None:
                step.residual(h_TD, self.memory(step))
