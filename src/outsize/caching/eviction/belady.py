"""Belady's optimum: what is next used farthest in the future is evicted first. For tests and replay, since it
must be given the future (L. Belady, 1966)."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Sequence

from outsize.caching.order import Order
from outsize.caching.policy import EvictionPolicy, Hints, Placed

NEVER = 1 << 62


class Belady(EvictionPolicy):
    def __init__(self, capacity: int, hints: Hints) -> None:
        super().__init__(capacity, hints)
        self._now, self._order = 0, Order()
        self._uses: dict[int, list[int]] = defaultdict(list)
        for time, ids in enumerate(hints.future):
            for i in dict.fromkeys(ids):
                self._uses[i].append(time)

    def place(self, ids: Sequence[int], keep: Collection[int] = (), ahead: bool = False) -> Placed:
        placed = super().place(ids, keep, ahead)
        self._now += not ahead
        return placed

    def used(self, id: int) -> None:
        now = self._now - 1 if self.is_ahead else self._now
        uses = self._uses[id]
        at = bisect_right(uses, now)
        self._order.set(id, (-(uses[at] if at < len(uses) else NEVER),))

    def victim(self, staying: Collection[int]) -> int:
        return self._order.pop(staying)


policy = Belady
