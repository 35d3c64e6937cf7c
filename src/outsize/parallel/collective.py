"""What a model asks of its ranks: sums and gathers of tensors at named places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from outsize.parallel.dropped import Drop

Place = Literal["attention", "ffn", "block", "head"]


class Point(NamedTuple):
    """Where in the model ranks meet: after a layer's attention or feed-forward, after both (`block`, where
    the first was left out), or in the head (layer = the number of layers)."""

    layer: int
    place: Place


class Pending(Protocol):
    def wait(self) -> Tensor:
        """The result, the same bits on every rank. Called once. Raises PeerError."""


class Collective(Protocol):
    """Every rank makes the same calls in the same order, with as many rows and the same dtype."""

    rank: int
    world: int

    @property
    def drop(self) -> Drop:
        """Layers whose attention is not summed."""
        ...

    def sum(self, part_TD: Tensor, at: Point) -> Pending:
        """Start summing the ranks' parts: (T, D) fp32, of parts in bf16 or fp32."""

    def gather(self, part_TN: Tensor, at: Point, widths: Sequence[int]) -> Pending:
        """Start joining the ranks' columns, in order of ranks: (T, sum(widths)) in the parts' dtype; rank
        r's part has widths[r] columns. Nothing is rounded."""


class Ready(NamedTuple):
    """A result that is there already."""

    result: Tensor

    def wait(self) -> Tensor:
        return self.result
