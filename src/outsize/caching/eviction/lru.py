"""Least recently used goes first. Good for reuse in time; the worst there is for a cyclic scan."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from outsize.caching.order import take_first
from outsize.caching.policy import Hints, Policy, Slots


class Lru(Slots):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    def used(self, id: int, is_hit: bool) -> None:
        self._order.pop(id, None)
        self._order[id] = None

    def victim(self, staying: Collection[int]) -> int:
        return take_first([self._order], staying)


def policy(capacity: int, hints: Hints) -> Policy:
    return Lru(capacity)
