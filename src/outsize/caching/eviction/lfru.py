"""LFRU: the least frequently and recently used is evicted first, by uses over the time since
the last one."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from outsize.caching.policy import EvictionPolicy, Hints


class Lfru(EvictionPolicy):
    def __init__(self, capacity: int, hints: Hints) -> None:
        super().__init__(capacity, hints)
        size = hints.layers * hints.per_layer
        self._count, self._last = np.zeros(size), np.zeros(size)
        self._is_resident, self._clock = np.zeros(size, bool), 0

    def used(self, id: int) -> None:
        self._clock += 1
        self._count[id] += 1
        self._last[id], self._is_resident[id] = self._clock, True

    def victim(self, staying: Collection[int]) -> int:
        is_free = self._is_resident.copy()
        is_free[list(staying)] = False
        ids = np.flatnonzero(is_free)
        worth = self._count[ids] / (self._clock + 1 - self._last[ids])
        found = int(ids[worth.argmin()])
        self._is_resident[found] = False
        return found


policy = Lfru
