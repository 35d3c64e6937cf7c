"""A model's blocks on some text, one after another: what each reads, what its attention gives by head, and
its feed-forward on any neurons. What is learnt of a block whose sum after attention is left out needs no
more (Sync-Point Drop, arXiv 2502.20727).

Shapes: T tokens of all sequences, D width, K groups of a key head and its queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from outsize.adapt.change import AS_IS, Change
from outsize.adapt.statistics import States
from outsize.adapt.trainable import TrainableModel
from outsize.model_config import Description

Range = tuple[int, int]  # first, last + 1


@dataclass
class Block:
    """One layer; `weights`: as training reads them."""

    layer: int
    description: Description
    weights: dict[str, Tensor]
    x_TD: Tensor  # the stream that enters it
    normed_TD: Tensor  # what attention reads
    inner_TN: Tensor  # what attention's output map reads

    def by_key(self) -> list[Tensor]:
        """(T, D) fp32 of each key head's queries, of which attention's output is the sum; no bias."""
        d, o = self.description, self.weights["o"]
        each = d.num_heads // d.num_kv_heads * d.head_dim
        pieces = zip(self.inner_TN.split(each, 1), o.split(each, 1), strict=True)
        return [linear(x, w).float() for x, w in pieces]

    @property
    def bias_D(self) -> Tensor | float:
        """Of attention's output map, which every rank has."""
        return self.weights["o_bias"] if self.description.o_bias else 0.0

    def ffn(self, h_TD: Tensor, neurons: Range) -> Tensor:
        """(T, D) fp32: what some neurons give of a stream after attention."""
        d, w = self.description, self.weights
        (a, b), all_ = neurons, d.ffn_width
        x = rms_norm(h_TD, h_TD.shape[-1:], w["ffn_norm"], d.norm_eps).to(w["gate_up"].dtype)
        rows = torch.cat([w["gate_up"][a:b], w["gate_up"][all_ + a : all_ + b]])
        both = linear(x, rows)
        if d.mlp_bias:
            bias = w["gate_up_bias"]
            both = (both + torch.cat([bias[a:b], bias[all_ + a : all_ + b]])).to(x.dtype)
        return linear(AS_IS.inner(both, d), w["down"][:, a:b]).float()

    def ffns(
        self,
        attention: Sequence[Tensor],
        neurons: Sequence[Range],
        rows: slice | Tensor = slice(None),
    ) -> Tensor:
        """(T, D) fp32 of some tokens: what the feed-forwards of all ranks give together, of what each takes
        for attention's output without its bias, and each rank's neurons."""
        x_TD = self.x_TD[rows] + self.bias_D
        given = zip(attention, neurons, strict=True)
        return torch.stack([self.ffn(x_TD + a, some) for a, some in given]).sum(0)

    def some(self, rows: slice | Tensor) -> Block:
        """Of some tokens."""
        x, normed, inner = (t[rows] for t in (self.x_TD, self.normed_TD, self.inner_TN))
        return Block(self.layer, self.description, self.weights, x, normed, inner)


def blocks(model: TrainableModel, ids_BT: Tensor) -> Iterator[Block]:
    """Each layer in turn, over all sequences. Of models without norms after sub-layers."""
    states = States(model, ids_BT)
    for layer in range(model.description.num_layers):
        x_TD = torch.cat([h.flatten(0, 1) for h in states.parts])
        seen = _Seen()
        with torch.no_grad():
            states.advance(seen)
        normed_TD, inner_TN = (torch.cat(seen.found[name]) for name in ("qkv", "o"))
        yield Block(layer, model.description, model.tensors(layer), x_TD, normed_TD, inner_TN)


def parts(by_key: Sequence[Tensor], order: Sequence[int], ends: Sequence[int]) -> list[Tensor]:
    """(T, D) of each rank, which has those key heads of an order that end where it says."""
    starts = [0, *ends]
    held = [[by_key[k] for k in order[a:b]] for a, b in zip(starts, ends, strict=False)]
    return [torch.stack(some).sum(0) for some in held]


@dataclass
class _Seen(Change):
    """What went into a layer's maps."""

    found: dict[str, list[Tensor]] = field(default_factory=lambda: {"qkv": [], "o": []})

    def weight(self, w: Tensor, x: Tensor, layer: int, name: str) -> Tensor:
        if name in self.found:
            self.found[name].append(x.flatten(0, 1))
        return w
