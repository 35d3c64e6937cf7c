"""Least frequently used goes first, counted since the beginning; among equals the least recent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from outsize.weights.policy import Hints, Policy, Slots


class Lfu(Slots):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._count: Counter[int] = Counter()
        self._last: dict[int, int] = {}
        self._clock = 0

    def used(self, id: int, is_hit: bool) -> None:
        self._clock += 1
        self._count[id] += 1
        self._last[id] = self._clock

    def victim(self, staying: Collection[int]) -> int:
        candidates = (i for i in self.slot_of if i not in staying)
        return min(candidates, key=lambda i: (self._count[i], self._last[i]))


def policy(capacity: int, hints: Hints) -> Policy:
    return Lfu(capacity)
