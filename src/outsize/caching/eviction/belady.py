"""What is next used farthest in the future goes first: the optimum, for tests and replay, since it
must be told the future (L. Belady, 1966)."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Sequence

from outsize.caching.order import Order
from outsize.caching.policy import Hints, Placed, Policy, Slots

NEVER = 1 << 62


class Belady(Slots):
    def __init__(self, capacity: int, future: Sequence[Sequence[int]]) -> None:
        super().__init__(capacity)
        self._now, self._order = 0, Order()
        self._uses: dict[int, list[int]] = defaultdict(list)
        for time, ids in enumerate(future):
            for i in dict.fromkeys(ids):
                self._uses[i].append(time)

    def place(self, ids: Sequence[int], keep: Collection[int] = (), ahead: bool = False) -> Placed:
        placed = super().place(ids, keep, ahead)
        self._now += not ahead
        return placed

    def used(self, id: int, is_hit: bool) -> None:
        now = self._now - 1 if self.is_ahead else self._now
        uses = self._uses[id]
        at = bisect_right(uses, now)
        self._order.set(id, (-(uses[at] if at < len(uses) else NEVER),))

    def victim(self, staying: Collection[int]) -> int:
        return self._order.pop(staying)


def policy(capacity: int, hints: Hints) -> Policy:
    return Belady(capacity, hints.future)
