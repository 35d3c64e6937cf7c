"""The dense feed-forward of few rows, neurons by neurons: predict which bundles will fire, fetch those
that are not in memory, compute them alone (LLM in a flash, arXiv 2312.11514). Lossy, but for a ReLU model
with an exact gate.

A row's bits are its own: what it leaves out is zero in its inner activations, which the dense kernel
multiplies. With all bundles chosen it is the dense feed-forward, bit for bit
(tests/laws/test_neurons.py). Long spans are not run here: they want nearly all neurons anyway.

In the mode `resident`, as in the paper, all that is in memory is computed, for every row: a neuron that the
predictor missed may be there. Then answers depend on what was computed before, and on other rows.

Shapes: T rows, D width, F neurons, N bundles, n chosen by some row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outsize.kernels.norm import RMSNorm, norm_of
from outsize.model.ffn.dense import activated
from outsize.model.layers import Linear
from outsize.model.predictors.choose import Chooser
from outsize.model.step import Step
from outsize.model_config import Description
from outsize.storage.table import activation_type
from outsize.weights.neurons import NeuronBank
from outsize.weights.spec import Recorder


@dataclass(frozen=True, slots=True)
class Biases:
    """Of a feed-forward's gate and up, (2, N, bundle), or of up, (1, N, bundle); and of down (D)."""

    gate_up: Tensor
    down_D: Tensor


class PagedNeurons:
    """h += post(down(activation(gate(x)) * up(x))), or post(down(activation(up(x)))), over the neurons that
    the predictor names, for each row."""

    def __init__(
        self,
        d: Description,
        bank: NeuronBank,
        chooser: Chooser,
        recorder: Recorder | None = None,
        takes_resident: bool = False,
    ) -> None:
        """`takes_resident`: what is in memory is computed, too, for every row (the paper's way)."""
        vectors, form = bank.vectors, bank.form
        of = {name: torch.cat([w.fields["w"][0] for w in ws]) for name, ws in vectors.items()}
        dtype = activation_type(form.gate_up)
        self._norm = None if d.parallel else norm_of(of, "ffn_norm", d.norm_eps, dtype)
        self._post = (
            RMSNorm(of["ffn_post_norm"], d.norm_eps, torch.float32) if d.post_norm else None
        )
        self._biases = None
        if d.mlp_bias:
            shaped = of["gate_up_bias"].view(-1, form.count, form.bundle)
            self._biases = Biases(shaped, of["down_bias"])
        self._activation, self._bank, self._gated = d.activation, bank, not d.two_matrix
        self._chooser, self._recorder = chooser, recorder
        self._takes_resident = takes_resident

    def run(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        """Changes the chunks' h_TD."""
        for h_TD, step in chunks:
            norm = self._norm
            x_TD = step.read.pop() if norm is None else step.backend.norm(h_TD, norm)
            chosen_TN, scores_TN = self._chooser(x_TD)
            rows = [row.nonzero()[:, 0].tolist() for row in chosen_TN]
            if self._recorder is not None:
                weights = [s[c].tolist() for s, c in zip(scores_TN, chosen_TN, strict=True)]
                self._recorder(self._bank.layer, rows, weights, ())
            y_TD = self._computed(x_TD, chosen_TN, rows, step)
            bias = None if self._biases is None else self._biases.down_D
            step.residual(h_TD, y_TD, self._post, bias)

    def _computed(
        self, x_TD: Tensor, chosen_TN: Tensor, rows: list[list[int]], step: Step
    ) -> Tensor:
        """(T, D)."""
        form, ids = self._bank.form, sorted({i for row in rows for i in row})
        if self._takes_resident:
            found, more = self._bank.fetch_more(ids, rows)
            ids, chosen_TN = [*ids, *more], torch.ones_like(chosen_TN)
        else:
            found = self._bank.fetch(ids, rows)
        if not ids:
            return torch.zeros_like(x_TD)
        both = Linear(found.gate_up())(x_TD, False)
        if self._biases is not None:
            both = (both + self._biases.gate_up[:, ids].flatten()).to(both.dtype)
        inner = (
            step.backend.gate(both, self._activation)
            if self._gated
            else activated(both, self._activation)
        )
        shape = len(x_TD), len(ids), form.bundle
        inner = inner.view(shape).masked_fill(~chosen_TN[:, ids, None], 0)
        if found.by_rows:
            return step.backend.combine(inner.flatten(1), *found.down_rows())
        full = inner.new_zeros(len(x_TD), form.count, form.bundle)
        full[:, ids] = inner
        return Linear(found.down(self._bank.shared))(full.flatten(1), False)
