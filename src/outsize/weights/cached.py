"""Slots for records, a policy that fills them, and reads ahead. Ids are record numbers of the table."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from outsize.caching.eviction.pin_and_ring import PinAndRing
from outsize.caching.policy import Policy
from outsize.caching.slots import Load, SlotTable
from outsize.kernels.backend import Backend
from outsize.storage.buffers import BufferPool
from outsize.storage.reader import Reader
from outsize.storage.table import Table, Weights, views
from outsize.storage.tickets import Ticket

Tick = Callable[[int], None]


class Cached:
    """`capacity` slots, each a buffer allocated once, and a policy that fills them."""

    def __init__(
        self,
        table: Table,
        reader: Reader,
        backend: Backend,
        capacity: int,
        policy: Policy,
        scan: Sequence[int] = (),
        depth: int | None = None,
        lent: int = 0,
        anew: Callable[[], Policy] | None = None,
    ) -> None:
        """`scan`: the ids that are fetched in this order, over and over; the next `depth` (None: as
        many as there are slots) are read ahead. `lent`: more slots, for the times between `borrow` and
        `give_back`. `anew` makes a policy as this one was, for `restore`."""
        self.table, self.traffic, self._reader = table, table.traffic, reader
        self.slot_table = SlotTable(policy, table.traffic, table.header.stride)
        self._backend, self._scan, self._depth = (
            backend,
            sorted(scan),
            capacity if depth is None else depth,
        )
        self._ring_size = self._depth
        self._num_slots, self._narrowed = (
            capacity,
            0,
        )  # slots that there are, and that were given up
        self._first = capacity - self._depth  # of the slots that are written over and over
        self._arena = BufferPool(self._first, table.header.stride)
        self._ring = BufferPool(self._depth, table.header.stride)
        self._ring.settle()
        self._lent, self._borrowed = BufferPool(lent, table.header.stride), range(0)
        self._extra = range(capacity, capacity + lent)
        self._views: list[Weights | None] = [None] * (capacity + lent)
        self._tickets: dict[int, Ticket] = {}  # by slot, until settled
        self._anew, self._unpinned = anew, list[int]()
        self._whole: dict[int, int] = {}  # slot -> id, of records that are surely there

    def load(self, ids: Sequence[int], tick: Tick) -> dict[int, Weights]:
        """Fill slots at the beginning: many records in flight, none counted as a miss."""
        placed = self.slot_table.load(ids)
        self._read(placed.loads, True)
        for i in ids:
            self._settle(placed.slots[i])
            tick(self.table.header.stride)
        return {i: self._view(placed.slots[i]) for i in ids}

    def fetch(self, ids: Sequence[int]) -> list[Weights]:
        slots = self._ask(ids)
        for slot in slots.values():
            self._settle(slot)
        return [self._view(slots[i]) for i in ids]

    def stream(
        self, ids: Sequence[int], in_order: bool = False, then: Callable[[], None] | None = None
    ) -> Iterator[list[tuple[int, Weights]]]:
        """`in_order`: one by one as asked, whatever is there first; `then`: called once all are on their
        way."""
        waiting = self._ask(ids)
        if then is not None:
            then()
        while waiting:
            ready = [] if in_order else [i for i, s in waiting.items() if self._is_there(s)]
            found = []
            for i in ready or [next(iter(waiting))]:
                slot = waiting.pop(i)
                self._settle(slot)
                found.append((i, self._view(slot)))
            yield found

    def expect(self, ids: Sequence[int], most: int) -> None:
        """Read ahead what a prefetcher wants."""
        self._read(self.slot_table.expect_some(ids, most), False)

    def give_up(self, ids: Sequence[int]) -> None:
        """These were read ahead in vain: those that nobody has begun to read are not read."""
        slots = {i: self.slot_table.slot_of[i] for i in ids}
        waiting = {i: self._tickets.get(slot) for i, slot in slots.items()}
        begun = [i for i, ticket in waiting.items() if ticket is None or not ticket.cancel()]
        self.slot_table.give_up(ids, begun)

    def prefetch(self, ids: Sequence[int]) -> None:
        slot_table = self.slot_table
        missing = [i for i in dict.fromkeys(ids) if i not in slot_table.slot_of]
        for i in missing[: max(0, self._depth - len(slot_table.held) - len(slot_table.ahead))]:
            if (load := slot_table.expect(i)) is not None:
                self._read([load], False)

    def release(self) -> None:
        last = self.slot_table.held[-1:]
        self.slot_table.release()
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
        assert isinstance(self.slot_table.policy, PinAndRing)
        self._whole.pop(self.slot_table.slot_of[id], None)
        self._unpinned.append(id)
        slot = self.slot_table.policy.unpin(id)
        self.slot_table.forget(id)
        self._scan = sorted([*self._scan, id])
        if slot is None:
            self._depth = 1
            return 0
        self._drop(slot)
        return self.table.header.stride

    @property
    def slots(self) -> int:
        """That there are now, without lent ones."""
        return self._num_slots

    @property
    def streams(self) -> bool:
        """Are there records that pass through its slots?"""
        return bool(self._scan)

    def narrow(self, size: int, least: int) -> int:
        """Give up slots until `size` bytes are free, or `least` slots are left; the bytes this frees."""
        freed = 0
        while freed < size and (found := self.slot_table.policy.give_up(least)) is not None:
            slot, id = found
            if id is not None:
                self.slot_table.forget(id)
            if (ticket := self._tickets.pop(slot, None)) is not None and not ticket.cancel():
                ticket.wait_quietly()
            self._whole.pop(slot, None)
            self._drop(slot)
            self._narrowed += 1
            freed += self.table.header.stride
        return freed

    def _drop(self, slot: int) -> None:
        self._num_slots -= 1
        self._return(slot)

    def _return(self, slot: int) -> None:
        """Its memory, to the system."""
        self._views[slot] = None
        if slot < self._first:
            self._arena.drop(slot)
        else:
            self._ring.drop(slot - self._first)

    def scan(self, ids: Sequence[int]) -> None:
        """From now on these are fetched in order, over and over."""
        self._scan = sorted(ids)

    @property
    def lends(self) -> bool:
        """Are there slots that can be lent to it?"""
        return bool(self._extra)

    def borrow(self) -> None:
        """Read further ahead from now on, in memory that others do not need for a while."""
        if self.lends and not self._borrowed:
            assert isinstance(self.slot_table.policy, PinAndRing)
            self._lent.settle()
            self.slot_table.policy.lengthen(self._extra)
            self._borrowed, self._depth = self._extra, self._depth + len(self._extra)

    def give_back(self) -> int:
        """The end of it; the bytes this frees. What was read ahead into that memory is lost."""
        slots, self._borrowed = self._borrowed, range(0)
        if not slots:
            return 0
        assert isinstance(self.slot_table.policy, PinAndRing)
        for id in self.slot_table.policy.shorten(slots):
            self.slot_table.forget(id)
        for i, slot in enumerate(slots):
            if (ticket := self._tickets.pop(slot, None)) is not None and not ticket.cancel():
                ticket.wait_quietly()
            self._lent.drop(i)
            self._whole.pop(slot, None)
        self._depth -= len(slots)
        return len(slots) * self.table.header.stride

    def drain(self) -> None:
        """Wait for what is still being read."""
        for ticket in list(self._tickets.values()):
            ticket.wait_quietly()

    def restore(self) -> None:
        """After a call that an exception broke off, wherever that was, and once nothing is being read any
        more: only what is surely there is known, and nothing is lent. Broken off itself, it may be called
        again."""
        assert self._anew is not None
        policy, capacity = self._anew(), self._extra.start
        if isinstance(policy, PinAndRing):
            for id in self._unpinned:
                policy.unpin(id)
        self._whole = {slot: id for slot, id in self._whole.items() if slot < capacity}
        for _ in range(self._narrowed):  # no more slots than before, maybe others
            if (given := policy.give_up(0)) is not None:
                self._whole.pop(given[0], None)
                self._return(given[0])
        self.slot_table = SlotTable(policy, self.traffic, self.table.header.stride)
        self.slot_table.adopt({id: slot for slot, id in self._whole.items()})
        self._tickets, self._borrowed = {}, range(0)
        for i in range(len(self._extra)):
            self._lent.drop(i)
        self._scan = sorted({*self._scan, *self._unpinned})
        self._depth = self._ring_size or len(self._unpinned[:1])

    def _ask(self, ids: Sequence[int]) -> dict[int, int]:
        placed = self.slot_table.demand(ids, self._is_there)
        self._read(placed.loads, True)
        return placed.slots

    def _is_there(self, slot: int) -> bool:
        return slot not in self._tickets or self._tickets[slot].is_done

    def _read(self, loads: Sequence[Load], urgent: bool) -> None:
        """Start reading. Whatever was on its way to a slot is over first."""
        for id, slot in loads:
            self._whole.pop(slot, None)
            if (ticket := self._tickets.pop(slot, None)) is not None:
                ticket.wait_quietly()
            self._tickets[slot] = self._submit(id, slot, urgent)

    def _submit(self, index: int, slot: int, urgent: bool) -> Ticket:
        raw, out = self._buffer(slot)
        if self._views[slot] is None:
            self._views[slot] = views(raw, self.table.header, self._backend)
        return self._reader.submit(self.table, index, out, urgent=urgent)

    def _buffer(self, slot: int) -> tuple[Tensor, memoryview]:
        if slot >= self._extra.start:
            return self._lent[slot - self._extra.start]
        return self._arena[slot] if slot < self._first else self._ring[slot - self._first]

    def _settle(self, slot: int) -> None:
        """Wait until a slot's record is there; one that failed earlier is tried again."""
        ticket = self._tickets.get(slot)
        if ticket is None:
            return
        if ticket.is_done and ticket.error is not None:
            ticket = self._tickets[slot] = self._submit(self.slot_table.id_in[slot], slot, True)
        if not ticket.is_done:
            started = time.perf_counter()
            ticket.promote()
            ticket.wait_quietly()
            self.traffic.waited_s += time.perf_counter() - started
        ticket.wait()
        self._whole[slot] = self.slot_table.id_in[slot]
        del self._tickets[slot]

    def _view(self, slot: int) -> Weights:
        found = self._views[slot]
        assert found is not None
        return found
