"""Least-Stale (SpecMD, arXiv 2602.03921, section 4.2 as its readers describe it): what was last touched in
an earlier pass goes first, and within a pass what was touched first.

Touched means used, read ahead, or expected again while there. What is expected for a layer that this pass
has behind it is meant for the next pass, and stamped so: else it would be the first victim.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from outsize.caching.order import take_first
from outsize.caching.policy import Hints, Policy, Slots


class LeastStale(Slots):
    """Three queues: stale, current, and coming (stamped with the next pass)."""

    def __init__(self, capacity: int, per_layer: int) -> None:
        super().__init__(capacity)
        self._per_layer, self._layer = per_layer, -1
        self._stale: OrderedDict[int, None] = OrderedDict()
        self._current: OrderedDict[int, None] = OrderedDict()
        self._coming: OrderedDict[int, None] = OrderedDict()

    def begin_pass(self) -> None:
        self._stale.update(self._current)
        self._current, self._coming, self._layer = self._coming, OrderedDict(), -1

    def used(self, id: int, is_hit: bool) -> None:
        layer = id // self._per_layer
        if not self.is_ahead:
            self._layer = layer
        if id in self._coming:
            return
        for queue in (self._stale, self._current):
            queue.pop(id, None)
        is_next = self.is_ahead and layer <= self._layer
        (self._coming if is_next else self._current)[id] = None

    def victim(self, staying: Collection[int]) -> int:
        return take_first((self._stale, self._current, self._coming), staying)


def policy(capacity: int, hints: Hints) -> Policy:
    return LeastStale(capacity, hints.per_layer)
