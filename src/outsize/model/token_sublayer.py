"""What a layer reads of its tokens themselves (per-layer embeddings, as of Gemma 4): a third sub-layer,
behind the feed-forward, whose weights are in the feed-forward's record; and what a layer ends with.

Of each token a row of a table has W numbers for each layer, and as many are made of its embedding:
h += post(down(act(gate(h)) * (norm(context(embedding) / sqrt(D)) + sqrt(W) * row) / sqrt(2))).

Shapes: T rows, D model width, W numbers of a token in a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outsize.kernels.norm import RMSNorm
from outsize.model.attention import vector
from outsize.model.half import Runnable
from outsize.model.layers import Linear
from outsize.model.step import Step
from outsize.model.sublayer import scale_of
from outsize.model_config import Description
from outsize.storage.table import Weights, activation_type

Rows = Callable[[Step], Tensor]  # (T, W) fp32: a layer's part of the rows of a step's tokens
PAIR = 2.0**-0.5  # of a sum of two


class TokenReader:
    """h += what a layer makes of its tokens."""

    def __init__(self, d: Description, w: Weights, rows: Rows) -> None:
        self._gate, self._down = Linear(w["token_gate"]), Linear(w["token_down"])
        self._context, self._rows = Linear(w["token_context"]), rows
        weight, post = vector(w["token_norm"]), vector(w["token_post_norm"])
        # The norm of x / sqrt(D) is that of x with D times the epsilon.
        self._norm = RMSNorm(weight, d.norm_eps * d.width, torch.float32)
        self._post = RMSNorm(post, d.norm_eps, torch.float32)
        self._activation, self._dtype = d.activation, activation_type(w["token_gate"])
        self._row_scale = math.sqrt(d.token_width)

    def __call__(self, h_TD: Tensor, step: Step) -> None:
        gate_TW = self._gate(h_TD.to(self._dtype), step.wide)
        both = torch.cat([gate_TW, self._numbers(step).to(self._dtype)], dim=1)
        inner_TW = step.backend.gate(both, self._activation)
        step.residual(h_TD, self._down(inner_TW, step.wide), self._post)

    def _numbers(self, step: Step) -> Tensor:
        """(T, W) fp32 of a step's tokens, whatever stands around them."""
        embedded_TD = None if step.tokens is None else step.tokens.embedded_TD
        assert embedded_TD is not None
        context_TW = self._context(embedded_TD.to(self._dtype), step.wide).float()
        return (self._norm(context_TW) + self._rows(step) * self._row_scale) * PAIR


class LayerEnd:
    """A feed-forward; then what reads the tokens; then h *= a number."""

    def __init__(self, ffn: Runnable, reader: TokenReader | None, scale: float) -> None:
        self._ffn, self._reader, self._scale = ffn, reader, scale

    def run(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        self._ffn.run(chunks)
        for h_TD, step in chunks:
            if self._reader is not None:
                self._reader(h_TD, step)
            if self._scale != 1.0:
                h_TD.mul_(self._scale)


def recalled(layer: int) -> Rows:
    """A layer's part of the rows that a step has asked for."""

    def rows(step: Step) -> Tensor:
        found = None if step.tokens is None else step.tokens.recalled
        assert found is not None
        return found.numbers(layer)

    return rows


def layer_end(
    d: Description, layer: int, make: Callable[[Weights], Runnable], w: Weights
) -> LayerEnd:
    """A layer's feed-forward with what comes behind it, over weights in memory."""
    reader = TokenReader(d, w, recalled(layer)) if d.token_width else None
    return LayerEnd(make(w), reader, scale_of(d, w))
