"""Where weights live. `Resident`: all of a table, held. `Cached`: slots, a policy, and reads ahead.

Law: what `fetch` gives is what a fully resident table gives, bit for bit, for any trace and any
capacity that holds the request (tests/laws/test_residency.py). Ids are record numbers of the table.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from outsize.native.kernels import Kernels
from outsize.weights.arena import Arena
from outsize.weights.policies.pin_and_ring import PinAndRing
from outsize.weights.policy import Policy
from outsize.weights.reader import Reader, Ticket
from outsize.weights.table import Table, Traffic, Weights, views

Tick = Callable[[int], None]


class Residency(Protocol):
    """Records in fast memory, by id."""

    traffic: Traffic

    def fetch(self, ids: Sequence[int]) -> list[Weights]:
        """All of these at once, valid until `release`. Raises CapacityError, PackError, ReadError."""
        ...

    def release(self) -> None:
        """What was fetched has been used."""
        ...

    def stream(self, ids: Sequence[int]) -> Iterator[tuple[int, Weights]]:
        """The same, one by one as they are there: those in memory first."""
        ...

    def prefetch(self, ids: Sequence[int]) -> None:
        """Read ahead as many as can be, in this order."""
        ...


class Resident:
    """Every record, read at once; the plain twin."""

    def __init__(self, table: Table, reader: Reader, kernels: Kernels | None, tick: Tick) -> None:
        self.traffic = table.traffic
        ids = range(len(table))
        made = Cached(table, reader, kernels, len(table), PinAndRing(len(table), ids))
        self._weights = made.load(ids, tick)

    def fetch(self, ids: Sequence[int]) -> list[Weights]:
        return [self._weights[i] for i in ids]

    def release(self) -> None:
        """Nothing to do."""

    def stream(self, ids: Sequence[int]) -> Iterator[tuple[int, Weights]]:
        yield from ((i, self._weights[i]) for i in ids)

    def prefetch(self, ids: Sequence[int]) -> None:
        """Nothing to do."""


class Cached:
    """`capacity` slots, each a buffer allocated once, and a policy that fills them."""

    def __init__(
        self,
        table: Table,
        reader: Reader,
        kernels: Kernels | None,
        capacity: int,
        policy: Policy,
        scan: Sequence[int] = (),
        depth: int | None = None,
    ) -> None:
        """`scan`: the ids that are fetched in this order, over and over; the next `depth` (None: as
        many as there are slots) are read ahead."""
        self.table, self.traffic, self._reader, self._policy = table, table.traffic, reader, policy
        self._kernels, self._scan, self._depth = (
            kernels,
            sorted(scan),
            capacity if depth is None else depth,
        )
        self._first = capacity - self._depth  # of the slots that are written over and over
        self._arena = Arena(self._first, table.header.stride)
        self._ring = Arena(self._depth, table.header.stride)
        self._ring.settle()
        self._views: list[Weights | None] = [None] * capacity
        self._tickets: dict[int, Ticket] = {}  # by slot, until settled
        self._where: dict[int, int] = {}  # id -> slot
        self._id_in: dict[int, int] = {}  # slot -> id
        self._ahead: set[int] = set()  # read ahead, not yet asked for
        self._held: Sequence[int] = ()

    def load(self, ids: Sequence[int], tick: Tick) -> dict[int, Weights]:
        """Fill slots at the beginning: many records in flight, none counted as a miss."""
        slots = self._place(ids, True)
        for i in ids:
            self._settle(slots[i])
            tick(self.table.header.stride)
        return {i: self._view(slots[i]) for i in ids}

    def fetch(self, ids: Sequence[int]) -> list[Weights]:
        slots = self._ask(ids)
        for slot in slots.values():
            self._settle(slot)
        return [self._view(slots[i]) for i in ids]

    def stream(self, ids: Sequence[int]) -> Iterator[tuple[int, Weights]]:
        slots = self._ask(ids)
        for i, slot in sorted(slots.items(), key=lambda item: item[1] in self._tickets):
            self._settle(slot)
            yield i, self._view(slot)

    def prefetch(self, ids: Sequence[int]) -> None:
        keep = {*self._held, *self._ahead}
        missing = [i for i in dict.fromkeys(ids) if i not in self._where]
        for i in missing[: max(0, self._depth - len(keep))]:
            self._place([i], False, keep)
            self._ahead.add(i)
            keep.add(i)

    def release(self) -> None:
        last, self._held = self._held[-1:], ()
        if self._scan and last:
            self.prefetch(self.following(last[0]))

    def following(self, id: int) -> Sequence[int]:
        """The next ids of the scan, as many as there are slots for."""
        at = bisect_right(self._scan, id)
        return [*self._scan[at:], *self._scan[:at]][: self._depth]

    def start(self) -> None:
        """Read the beginning of the scan ahead."""
        self.prefetch(self._scan[: self._depth])

    def unpin(self, id: int) -> int:
        """Let a pinned record pass like the others, from the next step on; the bytes this frees."""
        assert isinstance(self._policy, PinAndRing)
        slot = self._policy.unpin(id)
        del self._id_in[self._where.pop(id)]
        self._scan = sorted([*self._scan, id])
        if slot is None:
            self._depth = 1
            return 0
        self._views[slot] = None
        self._arena.drop(slot)
        return self.table.header.stride

    def drain(self) -> None:
        """Wait for what is still being read, so that the buffers may go."""
        for ticket in self._tickets.values():
            ticket.wait_quietly()

    def _ask(self, ids: Sequence[int]) -> dict[int, int]:
        """Place ids that are wanted now, and account for them."""
        before = set(ids) & self._where.keys()
        slots = self._place(ids, True)
        early, t, size = before & self._ahead, self.traffic, self.table.header.stride
        self._ahead -= early
        t.hits += len(before) - len(early)
        t.misses += len(slots) - len(before) + len(early)
        t.bytes_useful += len(early) * size
        t.bytes_demanded += (len(slots) - len(before)) * size
        self._held = tuple(slots)
        return slots

    def _place(
        self, ids: Sequence[int], urgent: bool, keep: set[int] | None = None
    ) -> dict[int, int]:
        slots, loads = self._policy.place(ids, keep or ())
        for i, slot in loads:
            self._forget(slot)
            self._where[i], self._id_in[slot] = slot, i
            self._tickets[slot] = self._submit(i, slot, urgent)
        return slots

    def _forget(self, slot: int) -> None:
        """Whatever was in a slot, or on its way there, is over."""
        if (ticket := self._tickets.pop(slot, None)) is not None:
            ticket.wait_quietly()
        old = self._id_in.pop(slot, None)
        if old is not None:
            del self._where[old]
            if old in self._ahead:
                self._ahead.remove(old)
                self.traffic.bytes_wasted += self.table.header.stride

    def _submit(self, index: int, slot: int, urgent: bool) -> Ticket:
        pinned = slot < self._first
        raw, out = self._arena[slot] if pinned else self._ring[slot - self._first]
        if self._views[slot] is None:
            self._views[slot] = views(raw, self.table.header, self._kernels)
        return self._reader.submit(self.table, index, out, urgent=urgent)

    def _settle(self, slot: int) -> None:
        """Wait until a slot's record is there; one that failed earlier is tried again."""
        ticket = self._tickets.get(slot)
        if ticket is None:
            return
        if ticket.is_done and ticket.error is not None:
            ticket = self._tickets[slot] = self._submit(self._id_in[slot], slot, True)
        if not ticket.is_done:
            started = time.perf_counter()
            self._reader.promote(ticket)
            ticket.wait_quietly()
            self.traffic.waited_s += time.perf_counter() - started
        ticket.wait()
        del self._tickets[slot]

    def _view(self, slot: int) -> Weights:
        found = self._views[slot]
        assert found is not None
        return found
