"""The slot table of a cache: which record is in which slot, and hits and misses by kind. The same bookkeeping
for real reads (weights/residency.py) and for replayed ones (replay/simulate.py).

A request is a hit, or a miss of one kind: `ready` (read ahead, and there), `late` (read ahead, still on its
way), `cold` (never there before), `collision` (evicted in this very pass), `capacity` (any other).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence

from outsize.caching.policy import Placed, Policy
from outsize.errors import CapacityError
from outsize.storage.stats import IOStats

Load = tuple[int, int]  # id, slot


class Outcomes:
    """By id, how often it was asked for and found in memory, found read ahead, on its way, or missing. Since
    the model was opened; one thread counts, others may look."""

    def __init__(self, ids: int) -> None:
        self.hits, self.ready, self.late, self.missed = (
            array("L", bytes(ids * array("L").itemsize)) for _ in range(4)
        )

    def count(self, placed: Placed, there: Mapping[int, bool]) -> None:
        """Some ids were asked for; `there`: of those read ahead, is it there?"""
        loads = dict(placed.loads)
        for id in placed.slots:
            if id in loads:
                self.missed[id] += 1
            elif id in there:
                (self.ready if there[id] else self.late)[id] += 1
            else:
                self.hits[id] += 1


class SlotTable:
    """A policy's decisions, applied and counted. `size`: bytes of a record."""

    def __init__(
        self,
        policy: Policy,
        stats: IOStats,
        size: int,
        leases: bool = True,
        outcomes: Outcomes | None = None,
    ) -> None:
        """`leases` False: records asked for together may evict each other. For replays only. `outcomes`:
        where requests are counted by id, too."""
        self.policy, self.stats, self._size, self._leases = policy, stats, size, leases
        self._outcomes = outcomes
        self.slot_of: dict[int, int] = {}
        self.id_in: dict[int, int] = {}
        self.ahead: set[int] = set()  # read ahead, not yet asked for
        self.in_use: Sequence[int] = ()  # asked for, not yet released
        self.cancelled: set[int] = set()  # have slots, but their reading was cancelled
        self._evicted: dict[int, int] = {}  # id -> pass of its last eviction
        self._pass = 0

    def begin_pass(self) -> None:
        self._pass += 1
        self.policy.begin_pass()

    def adopt(self, slots: Mapping[int, int]) -> None:
        """Start from these ids (keys) in these slots, which nobody counts."""
        self.policy.adopt(slots)
        self.slot_of, self.id_in = dict(slots), {slot: id for id, slot in slots.items()}

    def load(self, ids: Sequence[int]) -> Placed:
        """Place ids when a model is opened; not counted."""
        return self._place(ids, (), False)

    def demand(self, ids: Sequence[int], is_there: Callable[[int], bool]) -> Placed:
        """Place ids that are asked for now, and count them. Raises CapacityError, changing nothing."""
        if not self._leases and len(ids) > 1:
            parts = [self.demand([i], is_there) for i in ids]
            self.in_use = ()
            return Placed(
                {i: s for p in parts for i, s in p.slots.items()},
                [x for p in parts for x in p.loads],
            )
        inside = [i for i in dict.fromkeys(ids) if i in self.slot_of]
        there = {i: is_there(self.slot_of[i]) for i in inside if i in self.ahead}
        placed = self._place(ids, (), False)
        for id in self.cancelled & placed.slots.keys():
            self.cancelled.remove(id)
            placed.loads.append((id, placed.slots[id]))
            inside.remove(id)
        self.in_use = tuple(placed.slots)
        self._count(placed, len(inside), there)
        if self._outcomes is not None:
            self._outcomes.count(placed, there)
        return placed

    def prefetch(self, ids: Sequence[int], most: int) -> list[Load]:
        """Make room for ids that are not resident, in this order, until `most` are read ahead or no slot is
        left. Policies hear of those that are resident, too."""
        loads = []
        for id in ids:
            if id in self.slot_of:
                self.policy.place([id], (), True)
            elif len(self.ahead) >= most or (load := self._prefetch_one(id)) is None:
                break
            else:
                loads.append(load)
        return loads

    def _prefetch_one(self, id: int) -> Load | None:
        """Make room for it without evicting what is in use or read ahead; None if that cannot be."""
        keep = {*self.in_use, *self.ahead} if self._leases else ()
        try:
            placed = self._place([id], keep, True)
        except CapacityError:
            return None
        self.ahead.add(id)
        return placed.loads[0]

    def cancel(self, ids: Sequence[int], begun: Sequence[int]) -> None:
        """These were read ahead in vain. Those whose reading has not begun leave their slots empty."""
        self.ahead -= set(ids)
        self.cancelled |= set(ids) - set(begun)
        self.stats.bytes_wasted += len(begun) * self._size

    def release(self) -> None:
        """What was asked for is no longer in use."""
        self.in_use = ()

    def drop(self, id: int) -> int:
        """Its slot is needed or gone; returns that."""
        slot = self.slot_of.pop(id)
        del self.id_in[slot]
        self.cancelled.discard(id)
        if id in self.ahead:
            self.ahead.remove(id)
            self.stats.bytes_wasted += self._size
        return slot

    def _place(self, ids: Sequence[int], keep: Collection[int], ahead: bool) -> Placed:
        placed = self.policy.place(ids, keep, ahead)
        for id, slot in placed.loads:
            if slot in self.id_in:
                old = self.id_in[slot]
                self._evicted[old] = self._pass
                self.drop(old)
            self.slot_of[id], self.id_in[slot] = slot, id
        return placed

    def _count(self, placed: Placed, num_inside: int, there: dict[int, bool]) -> None:
        t, size = self.stats, self._size
        self.ahead -= there.keys()
        ready = sum(there.values())
        t.hits += num_inside - len(there)
        t.misses += len(placed.slots) - num_inside + len(there)
        t.ready += ready
        t.late += len(there) - ready
        t.bytes_useful += len(there) * size
        t.bytes_demanded += len(placed.loads) * size
        for id, _ in placed.loads:
            last = self._evicted.get(id)
            if last is None:
                t.cold += 1
            elif last == self._pass:
                t.collision += 1
            else:
                t.capacity += 1
