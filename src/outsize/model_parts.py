"""Parts of a description that few models have: attention over a latent, the gated delta rule, one rank's
share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Latent:
    """Latent attention (DeepSeek V2, arXiv 2405.04434): each token's keys and values of all heads are made
    of `rank` numbers, and a key of `rope` rotated numbers is shared by all heads. Here a description has one
    key head of rope + rank numbers (`head_dim`), and keys' and values' maps are applied to queries and
    sums."""

    rank: int
    rope: int
    key: int  # numbers of a head's key that do not rotate
    value: int  # numbers of a head's value
    query_rank: int = 0  # queries are made of so many numbers; 0: of the model's width


@dataclass(frozen=True, slots=True)
class Delta:
    """Layers with the gated delta rule in place of attention (arXiv 2412.06464): each value head keeps a
    matrix of `key` x `value` numbers of all tokens so far. Queries, keys and values are each a mean of the
    last `kernel` tokens', weighed by channel."""

    key_heads: int  # of queries and of keys
    value_heads: int  # a multiple
    key: int  # numbers of a head
    value: int
    kernel: int
    is_log: bool = False  # a head's decay is stored as the logarithm of its negative
    is_tiled: bool = (
        False  # value head i reads key head i % key_heads; else those of a key head lie together
    )

    @property
    def keys(self) -> int:
        """Numbers of all key heads."""
        return self.key_heads * self.key

    @property
    def values(self) -> int:
        """Numbers of all value heads."""
        return self.value_heads * self.value


@dataclass(frozen=True, slots=True)
class Shard:
    """What one of several ranks holds of a model (parallel/shard.py); all else is whole on each. Ranges are
    (first, last + 1), of the model's; key heads', and their queries', of an order that each layer may have.
    `cut` "gather": of a feed-forward's down, all inputs of some outputs; "sum": the inputs that are its
    neurons, of all outputs; "layers": some layers, whole. `attention`: whole on every rank, or by heads."""

    rank: int
    world: int
    cut: str  # "gather", "sum" or "layers"
    attention: str  # "whole" or "heads"
    neurons: tuple[int, int]
    outputs: tuple[int, int]
    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    ffn_width: int  # of the model, as the next
    num_heads: int
    num_kv_heads: int
    neuron_ends: tuple[int, ...]  # of each rank in turn, as the next
    output_ends: tuple[int, ...]
    layers: tuple[int, int]
    num_layers: int  # of the model
    orders: tuple[tuple[int, ...], ...] = ()  # of key heads in each layer, which `kv_heads` are of

    def order(self, layer: int) -> Sequence[int]:
        """The model's key heads, as ranks hold them in a layer."""
        return self.orders[layer] if self.orders else range(self.num_kv_heads)

    def keys(self, layer: int) -> list[int]:
        """The model's key heads that this rank has in a layer."""
        return list(self.order(layer)[slice(*self.kv_heads)])

    @property
    def neuron_widths(self) -> tuple[int, ...]:
        """Neurons of each rank."""
        return _widths(self.neuron_ends)

    @property
    def output_widths(self) -> tuple[int, ...]:
        """Outputs of down on each rank."""
        return _widths(self.output_ends)

    @property
    def inner(self) -> int:
        """Inputs of down here."""
        return self.ffn_width if self.cut == "gather" else self.neurons[1] - self.neurons[0]

    @property
    def outer(self) -> int:
        """Outputs of down here."""
        return self.outputs[1] - self.outputs[0]


def _widths(ends: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(b - a for a, b in zip((0, *ends), ends, strict=False))


def orders_fit(orders: Sequence[Sequence[int]], num_layers: int, num_keys: int) -> bool:
    """Has each layer all of a model's key heads? None at all are an order, too."""
    every = list(range(num_keys))
    return not orders or (len(orders) == num_layers and all(sorted(o) == every for o in orders))
