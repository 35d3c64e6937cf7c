"""Least frequently and recently used: what was used least often for the time since it was last used
goes first, count / age."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from outsize.caching.policy import Hints, Policy, Slots


class Lfru(Slots):
    def __init__(self, capacity: int, size: int) -> None:
        super().__init__(capacity)
        self._count, self._last = np.zeros(size), np.zeros(size)
        self._is_here = np.zeros(size, bool)
        self._clock = 0

    def used(self, id: int, is_hit: bool) -> None:
        self._clock += 1
        self._count[id] += 1
        self._last[id], self._is_here[id] = self._clock, True

    def victim(self, staying: Collection[int]) -> int:
        is_free = self._is_here.copy()
        is_free[list(staying)] = False
        ids = np.flatnonzero(is_free)
        worth = self._count[ids] / (self._clock + 1 - self._last[ids])
        found = int(ids[worth.argmin()])
        self._is_here[found] = False
        return found


def policy(capacity: int, hints: Hints) -> Policy:
    return Lfru(capacity, hints.layers * hints.per_layer)
