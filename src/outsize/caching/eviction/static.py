"""The most used of a profile are pinned; all others pass through the few slots that are left. Lent slots hold
the next most used."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from outsize.caching.eviction.pin_and_ring import PinAndRing
from outsize.caching.policy import Hints, Policy

RING_SHARE, LEAST_RING = 0.1, 8  # of the slots


class Profiled(PinAndRing):
    """`ranked`: ids, the most used first."""

    joins = True

    def __init__(self, capacity: int, ranked: Sequence[int]) -> None:
        ring = min(capacity, max(LEAST_RING, int(capacity * RING_SHARE)))
        super().__init__(capacity, ranked[: capacity - ring])
        self._rest = list(dict.fromkeys(ranked[capacity - ring :]))

    def slot_for(self, id: int, staying: Collection[int]) -> int:
        """Beside the record before it, if that slot may be taken: what lies side by side is read at once."""
        beside = self._slot_of.get(id - 1, -2) + 1
        if -1 in self._ring.values() or self._ring.get(beside, -1) in (-1, *staying):
            return super().slot_for(id, staying)
        return beside

    def lengthen(self, slots: Sequence[int]) -> list[int]:
        """Pin as many more; what of them is in the ring is forgotten there."""
        gone = []
        for id, slot in zip(self._rest, slots, strict=False):
            if (before := self._slot_of.pop(id, None)) is not None:
                self._ring[before] = -1
                gone.append(id)
            self._home[id] = slot
        return gone

    def shorten(self, slots: Sequence[int]) -> list[int]:
        ids = super().shorten([slot for slot in slots if slot in self._ring])
        lent = set(slots)
        for id in [i for i, slot in self._home.items() if slot in lent]:
            del self._home[id]
            if id in self._loaded:
                self._loaded.remove(id)
                ids.append(id)
        return ids


def policy(capacity: int, hints: Hints) -> Policy:
    return Profiled(capacity, hints.ranked)
