"""LRU: the least recently used is evicted first. Good for reuse in time; the worst for a cyclic scan."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from outsize.caching.order import take_first
from outsize.caching.policy import EvictionPolicy, Hints


class Lru(EvictionPolicy):
    def __init__(self, capacity: int, hints: Hints) -> None:
        super().__init__(capacity, hints)
        self._order: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    def used(self, id: int) -> None:
        self._order.pop(id, None)
        self._order[id] = None

    def victim(self, staying: Collection[int]) -> int:
        return take_first([self._order], staying)


policy = Lru
