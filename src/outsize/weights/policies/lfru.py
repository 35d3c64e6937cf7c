"""Least frequently and recently used: what was used least often for the time since it was last used
goes first, count / age."""

from __future__ import annotations

from collections.abc import Collection

from outsize.weights.policy import Hints, Policy, Slots


class Lfru(Slots):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._count: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._clock = 0

    def used(self, id: int, is_hit: bool) -> None:
        self._clock += 1
        self._count[id] = self._count.get(id, 0) + 1
        self._last[id] = self._clock

    def victim(self, staying: Collection[int]) -> int:
        now, count, last = self._clock + 1, self._count, self._last
        return min(
            self.slot_of.keys() - staying, key=lambda i: (count[i] / (now - last[i]), last[i])
        )


def policy(capacity: int, hints: Hints) -> Policy:
    return Lfru(capacity)
