"""Layers of the gated delta rule (kernels/delta.py), in place of attention: maps of what enters it, gates,
and the norm of what is read, by head.

Shapes: T tokens, D model width, C channels (queries, keys, values), H value heads, V numbers of a value.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from outsize.kernels.delta import DeltaSpec, delta_span
from outsize.kernels.norm import RMSNorm
from outsize.kv.state import State
from outsize.model.attention import vector
from outsize.model.layers import Linear, apart
from outsize.model.step import Step
from outsize.model_config import Description
from outsize.storage.table import Weights


class DeltaAttention:
    """o(norm(rule(qkv(x), gates(x))) * silu(z(x)))."""

    def __init__(self, d: Description, index: int, w: Weights) -> None:
        assert d.delta is not None
        self._index, self._sizes, (gates,) = index, d.delta, w["delta_gates"]
        self._qkvz, self._o = Linear(w["delta_qkvz"]), Linear(w["o"])
        self._gates_GD = gates.encoding.decode(gates.fields)
        decay_H, self._shift_H = vector(w["delta_decay"]), vector(w["delta_shift"])
        self._decay_H = -decay_H.exp() if d.delta.is_log else decay_H
        conv_CP = vector(w["delta_conv"]).view(-1, d.delta.kernel)
        self._spec = DeltaSpec(d.delta, conv_CP.T.contiguous())
        self._norm = RMSNorm(vector(w["delta_gain"]), d.norm_eps, torch.float32)

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        qkvz, gates_TG = self._qkvz(x_TD, step.wide), self._gates(x_TD, step.wide)
        channels, at, sums = qkvz.shape[1] - self._sizes.values, 0, list[Tensor]()
        for s in step.rows.segments:
            rows, state = slice(at, at + s.length), s.kv.states[self._index]
            sums.append(self._sums(state, qkvz[rows, :channels], gates_TG[rows], step))
            at += s.length
        read_TN = self._norm(torch.cat(sums)).flatten(1)
        y_TN = read_TN.mul_(apart(silu, qkvz[:, channels:].float(), step.wide))
        return self._o(y_TN.to(x_TD.dtype), step.wide)

    def _gates(self, x_TD: Tensor, wide: bool) -> Tensor:
        """(T, 2H) fp32: the logarithm of each head's decay, and its share of the difference."""
        x = x_TD.float()
        rows = [x @ self._gates_GD.T] if wide else [(self._gates_GD @ row)[None] for row in x]
        made = []
        for some in rows:
            b_TH, a_TH = some.chunk(2, dim=1)
            decay_TH = self._decay_H * softplus(a_TH + self._shift_H)
            made.append(torch.cat([decay_TH, b_TH.sigmoid()], dim=1))
        return torch.cat(made)

    def _sums(self, state: State, rows_TC: Tensor, gates_TG: Tensor, step: Step) -> Tensor:
        """(T, H, V) fp32 of one sequence's tokens, whose state they change."""
        run = partial(step.backend.delta, self._spec)
        window = state.take(rows_TC, gates_TG, run, step.wide)
        if step.wide:
            out = delta_span(self._spec, state.now, window, gates_TG)
        else:
            out = run(state.now, window, gates_TG)
        state.done(run)
        return out
