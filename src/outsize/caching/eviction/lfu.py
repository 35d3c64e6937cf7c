"""Least frequently used goes first, counted since the beginning; among equals the least recent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from outsize.caching.order import Order
from outsize.caching.policy import Hints, Policy, Slots


class Lfu(Slots):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._count: Counter[int] = Counter()
        self._order = Order()
        self._clock = 0

    def used(self, id: int, is_hit: bool) -> None:
        self._clock += 1
        self._count[id] += 1
        self._order.set(id, (self._count[id], self._clock))

    def victim(self, staying: Collection[int]) -> int:
        return self._order.pop(staying)


def policy(capacity: int, hints: Hints) -> Policy:
    return Lfu(capacity)
