"""Where weights live: some of a table's records in slots of memory, the others on disk until asked for.

A cache is its slots, each a buffer allocated once, the slot table (caching/slots.py: which record is in which
slot, by a policy), and reads on their way. Two kinds, by how records are asked for:
`ScanCache` (scan.py): in order, over and over, as layers are: some pinned, the others through a ring.
`RoutedCache` (routed.py): by a router, as experts are: an eviction policy.

Law: what `fetch` returns is what a fully resident table returns, bit-identical, for any trace and any
capacity that holds the request (tests/laws/test_residency.py). Ids are record numbers of the table.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from outsize.caching.policy import Policy
from outsize.caching.slots import Load, Outcomes, SlotTable
from outsize.pack.kinds.kind import kinds
from outsize.pack.tables import TableHeader
from outsize.storage.buffers import BufferPool
from outsize.storage.reader import Reader
from outsize.storage.table import Table, Weights, views
from outsize.storage.tickets import PIECE, Ticket

OnRead = Callable[[int], None]  # progress callback: bytes that were read


@dataclass(frozen=True, slots=True)
class Share:
    """What of a table stays in memory: record numbers, and a ring of slots for the others to pass through."""

    pinned: tuple[int, ...]
    ring: int
    lent: int = 0  # more slots, while no long span needs its scratch


Shares = Mapping[str, Share]  # by table


def all_of(header: TableHeader, most: int | None = None) -> Share:
    """Fully resident; of what is routed, at most so many records."""
    if kinds()[header.kind].routed:
        return Share((), len(header.keys) if most is None else most)
    return Share(tuple(range(len(header.keys))), 0)


class SlotCounts(NamedTuple):
    """Slots by what they are for: those filled once, those written over and over, and lent ones."""

    fixed: int
    ring: int
    lent: int = 0


class RecordCache(ABC):
    """Slots for a table's records. What is fetched is valid until `release`."""

    _scatters = False  # may records side by side in the file be read at once into any slots?

    def __init__(self, table: Table, reader: Reader, counts: SlotCounts) -> None:
        stride, starts = table.header.stride, (0, counts.fixed, counts.fixed + counts.ring)
        self.table, self.stats, self._reader = table, table.stats, reader
        self.slots = starts[2]  # that there are now, without lent ones
        self._depth = counts.ring  # slots to read ahead into
        self._lent = range(self.slots, sum(counts))
        self._borrowed = range(0)  # of the lent slots, those in use
        self._pools = [(at, BufferPool(n, stride)) for at, n in zip(starts, counts, strict=True)]
        self._pools[1][1].populate()
        self._views: list[Weights] = [{}] * sum(counts)  # by slot; empty until it is used
        self._tickets: dict[int, Ticket] = {}  # by slot, until waited for
        self._whole: dict[int, int] = {}  # slot -> id, of records that are surely there
        self.outcomes = Outcomes(len(table))
        self.slot_table = self._new_slots()

    def _new_slots(self) -> SlotTable:
        size = self.table.header.stride
        return SlotTable(self._new_policy(), self.stats, size, outcomes=self.outcomes)

    @abstractmethod
    def _new_policy(self) -> Policy:
        """One for the slots that there are now, all empty."""

    def load(self, ids: Sequence[int], on_read: OnRead) -> dict[int, Weights]:
        """Fill slots at the beginning: many records in flight, none counted as a miss."""
        placed = self.slot_table.load(ids)
        self._read(placed.loads, True)
        for i in ids:
            self._wait(placed.slots[i])
            on_read(self.table.header.stride)
        return {i: self._views[placed.slots[i]] for i in ids}

    def fetch(self, ids: Sequence[int], then: Callable[[], None] | None = None) -> list[Weights]:
        """All of these at once; `then`: called once all are being read. Raises CapacityError, PackError,
        ReadError."""
        slots = self._fetched(ids, then)
        return [self._views[slots[i]] for i in ids]

    def _fetched(
        self, ids: Sequence[int], then: Callable[[], None] | None = None
    ) -> dict[int, int]:
        """The slot of each, which it is in by now."""
        slots = self._demand(ids)
        if then is not None:
            then()
        for slot in slots.values():
            self._wait(slot)
        return slots

    def locate(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """All of these at once, as bytes: slots (S, stride), and in which of them each is. Raises
        CapacityError, PackError, ReadError."""
        slots = self._fetched(ids)
        first, pool = self._pool(slots[ids[0]])
        places = [slots[i] - first for i in ids]
        return pool.rows(), torch.tensor(places, dtype=torch.int64, device="cpu")

    def stream(
        self, ids: Sequence[int], in_order: bool = False, then: Callable[[], None] | None = None
    ) -> Iterator[list[tuple[int, Weights]]]:
        """The same, a few at a time as they arrive, those in memory first. `in_order`: one by one as asked;
        `then`: called once all are being read."""
        waiting = self._demand(ids)
        if then is not None:
            then()
        while waiting:
            ready = [] if in_order else [i for i, s in waiting.items() if self._is_there(s)]
            found = []
            for i in ready or [next(iter(waiting))]:
                slot = waiting.pop(i)
                self._wait(slot)
                found.append((i, self._views[slot]))
            yield found

    def prefetch(self, ids: Sequence[int]) -> None:
        """Read ahead as many as there are slots for, in this order."""
        missing = [i for i in ids if i not in self.slot_table.slot_of]
        self.prefetch_some(missing, self._depth - len(self.slot_table.in_use))

    def prefetch_some(self, ids: Sequence[int], most: int) -> None:
        """Read ahead, in this order, as long as no more than `most` are read ahead and not yet asked for."""
        self._read(self.slot_table.prefetch(ids, most), False)

    def cancel(self, ids: Sequence[int]) -> None:
        """These were read ahead in vain: those that nobody has begun to read are not read."""
        waiting = {i: self._tickets.get(self.slot_table.slot_of[i]) for i in ids}
        begun = [i for i, ticket in waiting.items() if ticket is None or not ticket.cancel()]
        self.slot_table.cancel(ids, begun)

    def release(self) -> None:
        """What was fetched has been used."""
        self.slot_table.release()

    def start(self) -> None:  # noqa: B027  only a scan knows
        """Loading is over: read ahead what is known to be next."""

    @property
    def lends(self) -> bool:
        """Are there slots that can be lent to it?"""
        return bool(self._lent)

    def borrow_scratch(self) -> None:
        """Use the lent slots from now on, in memory that long spans do not need for a while."""
        if self._lent and not self._borrowed:
            self._pools[2][1].populate()
            for id in self.slot_table.policy.lengthen(self._lent):
                self._whole.pop(self.slot_table.drop(id), None)
            self._borrowed = self._lent

    def return_scratch(self) -> int:
        """The end of it; the bytes this frees. What was read into that memory is lost."""
        slots, self._borrowed = self._borrowed, range(0)
        if not slots:
            return 0
        for id in self.slot_table.policy.shorten(slots):
            self.slot_table.drop(id)
        for i, slot in enumerate(slots):
            self._empty(slot)
            self._pools[2][1].drop(i)
        return len(slots) * self.table.header.stride

    def restore(self) -> None:
        """After a call that an exception broke off, wherever that was, and once nothing is being read any
        more: only what is surely there is known, and nothing is lent. Broken off itself, it may be called
        again."""
        self._whole = {slot: id for slot, id in self._whole.items() if slot < self._lent.start}
        self.slot_table = self._new_slots()
        self.slot_table.adopt({id: slot for slot, id in self._whole.items()})
        self._tickets, self._borrowed = {}, range(0)
        for i in range(len(self._lent)):
            self._pools[2][1].drop(i)

    def _demand(self, ids: Sequence[int]) -> dict[int, int]:
        placed = self.slot_table.demand(ids, self._is_there)
        self._read(placed.loads, True)
        return placed.slots

    def _is_there(self, slot: int) -> bool:
        return slot not in self._tickets or self._tickets[slot].is_done

    def _read(self, loads: Sequence[Load], urgent: bool) -> None:
        """Start reading. Whatever was on its way to a slot is over first."""
        for _, slot in loads:
            self._whole.pop(slot, None)
            if (ticket := self._tickets.pop(slot, None)) is not None:
                ticket.wait_quietly()
        for run in self._runs(loads):
            if len(run) == 1 or not self._submitted(run, urgent):
                for id, slot in run:
                    self._tickets[slot] = self._submit(id, slot, urgent)

    def _runs(self, loads: Sequence[Load]) -> list[list[Load]]:
        """What one read may fetch each: side by side in the file, and, unless it scatters, in slots."""
        if self._scatters:
            return _runs(sorted(loads), 0, max(1, PIECE // self.table.header.stride))
        return _runs(loads, 1, len(loads) if self.slot_table.policy.joins else 1)

    def _submitted(self, run: Sequence[Load], urgent: bool) -> bool:
        """Read records that lie side by side at once, if that can be."""
        (id, slot), last = run[0], run[-1][1]
        if self._scatters:
            outs = [self._prepared(slot) for _, slot in run]
            found = self._reader.submit_scattered(self.table, id, outs, urgent)
            return self._noted(run, found)
        first, pool = self._pool(slot)
        if not all(self._views[slot : last + 1]) or self._pool(last)[0] != first:
            return False
        out = pool.view(slot - first, len(run))
        return self._noted(run, self._reader.submit_run(self.table, id, out, urgent))

    def _noted(self, run: Sequence[Load], ticket: Ticket | None) -> bool:
        if ticket is None:
            return False
        self._tickets |= {slot: ticket for _, slot in run}
        return True

    def _submit(self, index: int, slot: int, urgent: bool) -> Ticket:
        return self._reader.submit(self.table, index, self._prepared(slot), urgent=urgent)

    def _prepared(self, slot: int) -> memoryview:
        """What a slot is read into."""
        raw, out = self._buffer(slot)
        if not self._views[slot]:
            self._views[slot] = views(raw, self.table.header, self._reader.backend)
        return out

    def _buffer(self, slot: int) -> tuple[Tensor, memoryview]:
        first, pool = self._pool(slot)
        return pool[slot - first]

    def _pool(self, slot: int) -> tuple[int, BufferPool]:
        """The slot's pool, and that one's first slot."""
        return next(found for found in reversed(self._pools) if slot >= found[0])

    def _wait(self, slot: int) -> None:
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
            self.stats.waited_s += time.perf_counter() - started
        ticket.wait()
        self._whole[slot] = self.slot_table.id_in[slot]
        del self._tickets[slot]

    def _empty(self, slot: int) -> None:
        """Nothing is in it, nor on its way."""
        if (ticket := self._tickets.pop(slot, None)) is not None and not ticket.cancel():
            ticket.wait_quietly()
        self._whole.pop(slot, None)

    def _drop_memory(self, slot: int) -> None:
        """Return a slot's memory to the system."""
        self._views[slot] = {}
        first, pool = self._pool(slot)
        pool.drop(slot - first)


def _runs(loads: Sequence[Load], step: int, most: int) -> list[list[Load]]:
    """Up to `most` each; cut where records do not follow each other, or, with a step of 1, slots do not."""
    out: list[list[Load]] = []
    for id, slot in loads:
        before = out[-1][-1] if out else (id, slot)
        follows = before[0] == id - 1 and (not step or before[1] == slot - step)
        if follows and len(out[-1]) < most:
            out[-1].append((id, slot))
        else:
            out.append([(id, slot)])
    return out
