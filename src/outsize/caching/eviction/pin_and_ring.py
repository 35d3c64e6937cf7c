"""For a cyclic scan, as of the layers: a fixed set is pinned, all others pass through a ring buffer of slots.

A scan of n records through c slots hits c - ring of n; least recently used would hit none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from outsize.caching.policy import Hints, Placed, Policy, too_many


class PinAndRing(Policy):
    """The first slots belong to the pinned ids, the others form the ring."""

    def __init__(self, capacity: int, pinned: Sequence[int]) -> None:
        self._home = {i: slot for slot, i in enumerate(dict.fromkeys(pinned[:capacity]))}
        self._capacity = capacity
        self._loaded: set[int] = set()  # pinned ids that are resident
        self._ring = dict.fromkeys(range(len(self._home), capacity), -1)  # slot -> id, oldest first
        self._slot_of: dict[int, int] = {}

    @property
    def room(self) -> int:
        return len(self._ring) or self._capacity

    def adopt(self, slots: Mapping[int, int]) -> None:
        self._loaded.update(i for i in slots if i in self._home)
        for id, slot in slots.items():
            if slot in self._ring:
                self._ring[slot], self._slot_of[id] = id, slot

    def place(self, ids: Sequence[int], keep: Collection[int] = (), ahead: bool = False) -> Placed:
        wanted = dict.fromkeys(ids)
        passing = [i for i in wanted if i not in self._home]
        staying = {*passing, *(i for i in keep if i in self._slot_of)}
        if len(staying) > len(self._ring):
            raise too_many(len(staying), len(self._ring))
        loads = [(i, self._home[i]) for i in wanted if i in self._home and i not in self._loaded]
        self._loaded.update(i for i, _ in loads)
        loads += [(i, self._take(i, staying)) for i in passing if i not in self._slot_of]
        return Placed({i: self._home.get(i, self._slot_of.get(i, -1)) for i in wanted}, loads)

    def unpin(self, id: int) -> int | None:
        """Let a pinned id pass like the others. Returns its slot, no longer used; None if there was no ring,
        and the slot became it."""
        slot = self._home.pop(id)
        self._loaded.discard(id)
        if self._ring:
            return slot
        self._ring[slot] = -1
        return None

    def drop_slot(self, least: int) -> tuple[int, int | None] | None:
        if self._home and self._ring:
            id, slot = self._home.popitem()
            was_loaded = id in self._loaded
            self._loaded.discard(id)
            return slot, id if was_loaded else None
        if len(self._ring) <= least:
            return None
        slot = next(iter(self._ring))
        return slot, next(iter(self.shorten([slot])), None)

    def lengthen(self, slots: Sequence[int]) -> list[int]:
        """Add slots to the ring: the next to be used."""
        self._ring = dict.fromkeys(slots, -1) | self._ring
        return []

    def shorten(self, slots: Sequence[int]) -> list[int]:
        """Remove slots from the ring."""
        ids = [i for slot in slots if (i := self._ring.pop(slot)) >= 0]
        for id in ids:
            del self._slot_of[id]
        return ids

    def slot_for(self, id: int, staying: Collection[int]) -> int:
        """The slot of the ring that is taken for an id: the oldest."""
        return next(s for s, i in self._ring.items() if i not in staying)

    def _take(self, id: int, staying: Collection[int]) -> int:
        slot = self.slot_for(id, staying)
        self._slot_of.pop(self._ring.pop(slot), None)
        self._ring[slot], self._slot_of[id] = id, slot
        return slot


def policy(capacity: int, hints: Hints) -> Policy:
    return PinAndRing(capacity, hints.pinned)
