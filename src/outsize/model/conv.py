"""Layers of a short convolution (LFM2) in place of attention: each channel is a weighed mean of the last
tokens', gated before and after by the token's own.

Shapes: T tokens, D model width, P tokens: those before that the mean needs, and T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outsize.kv.state import State
from outsize.model.attention import vector
from outsize.model.layers import Linear
from outsize.model.step import Step
from outsize.model_config import Description
from outsize.storage.table import Weights


class ShortConv:
    """o(c * mean(b * x)), of b, c and x, which are maps of what enters."""

    def __init__(self, d: Description, index: int, w: Weights) -> None:
        self._index, self._in, self._o = index, Linear(w["conv_in"]), Linear(w["o"])
        self._taps_PD = vector(w["conv_taps"]).view(-1, d.kernel).T.contiguous()

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        before, after, own = self._in(x_TD, step.wide).float().chunk(3, dim=1)
        rows_TD = (before * own).to(x_TD.dtype)
        sums, at = list[Tensor](), 0
        for s in step.rows.segments:
            state = s.kv.states[self._index]
            sums.append(self._sums(state, rows_TD[at : at + s.length], step.wide))
            at += s.length
        y_TD = torch.cat(sums).mul_(after)
        return self._o(y_TD.to(x_TD.dtype), step.wide)

    def _sums(self, state: State, rows_TD: Tensor, wide: bool) -> Tensor:
        """(T, D) fp32 of one sequence's tokens, which its state takes in."""
        gates = rows_TD.new_zeros(len(rows_TD), 0, dtype=torch.float32)
        window = state.take(rows_TD, gates, nothing, wide).float()
        out = window[: len(rows_TD)] * self._taps_PD[0]
        for i in range(1, len(self._taps_PD)):
            out.addcmul_(window[i : i + len(rows_TD)], self._taps_PD[i])
        state.done(nothing)
        return out


def nothing(now: Tensor, window: Tensor, gates: Tensor) -> None:
    """A convolution keeps inputs alone."""
