"""LFU: the least frequently used since the beginning is evicted first; among equals the least recent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from outsize.caching.order import Order
from outsize.caching.policy import EvictionPolicy, Hints


class Lfu(EvictionPolicy):
    def __init__(self, capacity: int, hints: Hints) -> None:
        super().__init__(capacity, hints)
        self._count: Counter[int] = Counter()
        self._order, self._clock = Order(), 0

    def used(self, id: int) -> None:
        self._clock += 1
        self._count[id] += 1
        self._order.set(id, (self._count[id], self._clock))

    def victim(self, staying: Collection[int]) -> int:
        return self._order.pop(staying)


policy = Lfu
