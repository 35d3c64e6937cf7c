"""Nested experts in a model that is trained: what every width of each feed-forward gives, which width a token
gets, and how far each is from the whole.

Shapes: B sequences, T tokens, D width of the stream, F neurons, M widths, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from outsize.adapt.change import Change
from outsize.adapt.trainable import TrainableModel
from outsize.kernels.plain import ACTIVATIONS
from outsize.pack.format import Pack
from outsize.storage.records import Records

Choose = Callable[[int, Tensor, Tensor], Tensor]  # layer, x (..., D), errors (..., M - 1) -> widths
LABELS = "agreement", "loss"


class Ffn(NamedTuple):
    """A layer's feed-forward in the order of its neurons."""

    gate_up: Tensor  # (2F, D)
    down: Tensor  # (D, F)


def ffns(pack: Pack, dtype: torch.dtype) -> list[Ffn]:
    """Of a pack of nested experts, put together again."""
    d, out = pack.description, []
    assert d.mixture is not None
    count = d.mixture.count
    tables = [t for t in pack.tables if t.kind == "experts"]
    at = {key: (t, i) for t in tables for i, key in enumerate(t.keys)}
    with Records(pack) as records:
        for layer in range(d.num_layers):
            gates, ups, downs = list[Tensor](), list[Tensor](), list[Tensor]()
            for piece in range(count):
                read = records.read(*at[layer * count + piece])
                both, down = (
                    torch.cat([w.encoding.decode(w.fields)[: w.num_rows] for w in read[name]]).to(
                        dtype
                    )
                    for name in ("gate_up", "down")
                )
                gate, up = both.chunk(2)
                gates.append(gate)
                ups.append(up)
                downs.append(down)
            out.append(Ffn(torch.cat([*gates, *ups]), torch.cat(downs, dim=1)))
    return out


def in_order(model: TrainableModel, order_LF: Tensor) -> list[Ffn]:
    """Of a dense model, with each layer's neurons in this order."""
    out = []
    for layer, order in enumerate(order_LF):
        w = model.tensors(layer)
        both = torch.cat([order, order + len(order)])
        out.append(Ffn(w["gate_up"][both], w["down"][:, order].contiguous()))
    return out


def widest(count: int) -> Choose:
    """Of so many widths, all of the feed-forward for every token."""
    return lambda layer, x, error: torch.full(
        x.shape[:-1], count - 1, dtype=torch.int64, device="cpu"
    )


class Prefixes(Change):
    """Runs every feed-forward at all of its widths, and goes on with the one that `choose` names (the last is
    all of it). `see` is shown each layer's input and what the widths give."""

    def __init__(
        self,
        model: TrainableModel,
        ffns: Sequence[Ffn],
        ends: Sequence[int],
        choose: Choose,
        corrections: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`ends`: neurons of each width, rising. `corrections`: a (L, M - 1, R, D), b, c, if there are."""
        self._model, self._ffns, self._ends, self._choose = model, ffns, ends, choose
        self._corrections = corrections
        self.chosen: list[Tensor] = []  # by layer, (B, T)
        self.inputs: list[Tensor] = []  # (B, T, D)
        self.errors: list[Tensor] = []  # (B, T, M - 1)
        self.states = torch.empty(0, dtype=torch.float32, device="cpu")  # after the last layer

    def ffn(self, x: Tensor, h: Tensor, layer: int, whole: Callable[[], Tensor]) -> Tensor:
        sums = self.sums(x, layer)
        self.look(sums, layer, whole)
        error = errors(self._model, h, sums, layer)
        width = self._choose(layer, x, error)
        self.chosen.append(width)
        self.inputs.append(x.detach())
        self.errors.append(error)
        stacked = torch.stack(sums, dim=-2)
        return stacked.take_along_dim(width[..., None, None], dim=-2).squeeze(-2)

    def look(self, sums: Sequence[Tensor], layer: int, whole: Callable[[], Tensor]) -> None:
        """Shown what each width gives; `whole`: the model's own feed-forward. Here, nothing is done."""

    def sums(self, x: Tensor, layer: int) -> list[Tensor]:
        """What each width gives, in fp32."""
        inner = inner_of(self._model, x, self._ffns[layer])
        out, total, first = list[Tensor](), torch.zeros_like(x, dtype=torch.float32), 0
        for end in self._ends:
            part = linear(inner[..., first:end], self._ffns[layer].down[:, first:end])
            total = total + part.float()
            out.append(total)
            first = end
        if self._corrections is not None:
            for i in range(len(out) - 1):
                out[i] = out[i] + corrected(self._corrections, layer, i, x)
        return out


def corrected(corrections: Mapping[str, Tensor], layer: int, width: int, x: Tensor) -> Tensor:
    """What is added for a width."""
    a, b, c = (corrections[name][layer, width] for name in ("a", "b", "c"))
    return linear(linear(x.float(), a), b) + c


def inner_of(model: TrainableModel, x: Tensor, f: Ffn) -> Tensor:
    """(..., F): what down multiplies."""
    gate, up = linear(x, f.gate_up).chunk(2, dim=-1)
    return ACTIVATIONS[model.description.activation](gate) * up


def errors(model: TrainableModel, h: Tensor, sums: Sequence[Tensor], layer: int) -> Tensor:
    """(..., M - 1): how far the stream is after each width from where it is after all, as a share of its
    length. (Of the feed-forward's own output, where it is small, little would look like much.)"""
    with torch.no_grad():
        whole = model.added(h, sums[-1], layer)
        size = whole.norm(dim=-1).clamp_min(1e-9)
        off = [(model.added(h, s, layer) - whole).norm(dim=-1) / size for s in sums[:-1]]
        return torch.stack(off, dim=-1)


def labels(error: Tensor, level: float | Tensor) -> Tensor:
    """The narrowest width whose error, and that of all wider ones, is at most `level`; higher levels give
    narrower ones."""
    wrong = error > level
    return (error.shape[-1] - wrong.flip(-1).int().argmax(-1)) * wrong.any(-1)


class Losses(Prefixes):
    """As `Prefixes`; while gradients go backward, errors become what each width would add to the loss, to
    first order: <dL/dy, S_i - y>."""

    def ffn(self, x: Tensor, h: Tensor, layer: int, whole: Callable[[], Tensor]) -> Tensor:
        out = super().ffn(x, h, layer, whole)
        with torch.no_grad():
            sums = self.sums(x, layer)
            apart = torch.stack([s - sums[-1] for s in sums[:-1]], dim=-2)
        if out.requires_grad:
            out.register_hook(partial(self._see, layer, apart))
        return out

    def _see(self, layer: int, apart: Tensor, g: Tensor) -> None:
        self.errors[layer] = (apart * g.float()[..., None, :]).sum(-1)
