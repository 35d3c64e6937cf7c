"""What is next used farthest in the future goes first: the optimum, for tests and replay, since it
must be told the future (L. Belady, 1966)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Sequence

from outsize.weights.policy import Hints, Placed, Policy, Slots

NEVER = 1 << 62


class Belady(Slots):
    def __init__(self, capacity: int, future: Sequence[Sequence[int]]) -> None:
        super().__init__(capacity)
        self._now = 0
        self._uses: dict[int, deque[int]] = defaultdict(deque)
        for time, ids in enumerate(future):
            for i in dict.fromkeys(ids):
                self._uses[i].append(time)

    def place(self, ids: Sequence[int], keep: Collection[int] = ()) -> Placed:
        placed = super().place(ids, keep)
        self._now += 1
        return placed

    def used(self, id: int, is_hit: bool) -> None:
        """Nothing to remember: the future is known."""

    def victim(self, staying: Collection[int]) -> int:
        return max((i for i in self.slot_of if i not in staying), key=self._next_use)

    def _next_use(self, id: int) -> int:
        uses = self._uses[id]
        while uses and uses[0] <= self._now:
            uses.popleft()
        return uses[0] if uses else NEVER


def policy(capacity: int, hints: Hints) -> Policy:
    return Belady(capacity, hints.future)
