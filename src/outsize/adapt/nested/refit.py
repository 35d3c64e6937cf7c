"""Down maps whose prefixes do without the rest as well as they can, in closed form: least squares over all
widths at once, of one map that they share (each width's error counts as much, the whole's more).

Of a layer with hidden states H (N, F), down W (D, F) and widths that end at F_1 < ... < F_M = F, W' makes
sum_i c_i |H[:, :F_i] W'[:, :F_i]^T - H W^T|^2 least: one system of F equations, whose matrix is H^T H with
each entry (f, g) times the c of the widths that have both. A token counts by the inverse of the length of its
residual stream, as labels judge it; first positions, unlike all others, then weigh no more than any.

Shapes: N tokens, D width of the stream, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outsize.adapt.change import Change
from outsize.adapt.nested.prefixes import Ffn, inner_of
from outsize.adapt.sparsity.words import spread
from outsize.adapt.statistics import States, bf16_products
from outsize.adapt.trainable import TrainableModel

WHOLE = 32.0  # what the error of the whole counts, of a narrow width 1
DAMP = 0.01  # of the mean of the diagonal: how much the map stays as it was
TIMES = 8  # tokens for each neuron: with fewer, maps fit the text


class _Moments(Change):
    """Sums of h h^T of one layer's weighted hidden states."""

    def __init__(self, model: TrainableModel, f: Ffn) -> None:
        self._model, self._ffn = model, f
        self.sum_FF = torch.zeros(0, 0, dtype=torch.float32, device="cpu")

    def ffn(self, x: Tensor, h: Tensor, layer: int, whole: Callable[[], Tensor]) -> Tensor:
        y = whole()
        size = self._model.added(h, y, layer).norm(dim=-1, keepdim=True).clamp_min(1e-9)
        rows = (inner_of(self._model, x, self._ffn).float() / size).flatten(0, 1)
        now = rows.T @ rows
        self.sum_FF = now if not len(self.sum_FF) else self.sum_FF + now
        return y


@torch.no_grad()
def refitted(
    model: TrainableModel, ffns: Sequence[Ffn], ends: Sequence[int], ids_BT: Tensor
) -> list[Ffn]:
    """The same feed-forwards in fp32 with other down maps, fitted on sequences."""
    count = -(-TIMES * ends[-1] // ids_BT.shape[1])
    states, out = States(model, spread(ids_BT, count)), list[Ffn]()
    with bf16_products():
        for f in ffns:
            seen = _Moments(model, f)
            states.advance(seen)
            down = fit(seen.sum_FF, f.down.float(), ends)
            out.append(Ffn(f.gate_up.float(), down))
    return out


def fit(moment_FF: Tensor, down_DF: Tensor, ends: Sequence[int]) -> Tensor:
    """(D, F), of second moments of hidden states."""
    size = len(moment_FF)
    counts = torch.zeros(size, dtype=moment_FF.dtype, device=moment_FF.device)
    for end in ends:
        counts[:end] += WHOLE if end == size else 1.0
    damp = DAMP * float(moment_FF.diagonal().mean()) * len(ends)
    left_FF = moment_FF * torch.minimum(counts[:, None], counts)
    left_FF.diagonal().add_(damp)
    right_FD = counts[:, None] * (moment_FF @ down_DF.T) + damp * down_DF.T
    found: Tensor = torch.linalg.solve(left_FF, right_FD).T
    return found.contiguous()
