"""Least-Stale (SpecMD, arXiv 2602.03921, section 4.2 as its readers describe it): what was last touched in
an earlier pass is evicted first, and within a pass what was touched first.

Touched means used, prefetched, or wanted by a prefetcher again while resident. What is prefetched for a layer
that this pass has behind it is meant for the next pass, and stamped so: else it would be the first victim.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from outsize.caching.order import take_first
from outsize.caching.policy import EvictionPolicy, Hints


class LeastStale(EvictionPolicy):
    """Three queues: stale, current, and coming (stamped with the next pass)."""

    def __init__(self, capacity: int, hints: Hints) -> None:
        super().__init__(capacity, hints)
        self._per_layer, self._layer = hints.per_layer, -1
        self._stale: OrderedDict[int, None] = OrderedDict()
        self._current: OrderedDict[int, None] = OrderedDict()
        self._coming: OrderedDict[int, None] = OrderedDict()

    def begin_pass(self) -> None:
        self._stale.update(self._current)
        self._current, self._coming, self._layer = self._coming, OrderedDict(), -1

    def used(self, id: int) -> None:
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


policy = LeastStale
