"""Simulates a cache of experts: replays recorded routing in virtual time, through the same policies,
prefetchers and counters as the engine. One link reads one record after another, what is waited for first;
computing goes on in parallel.

A layer's event is atomic: all its records are placed before any of them may be a victim. Resident experts
are computed while the missing ones arrive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from outsize.caching.misses import MissHandler, count, fetch
from outsize.caching.policy import Policy
from outsize.caching.prefetcher import Prefetcher, Seen, most_ahead
from outsize.caching.replay.trace import Event
from outsize.caching.slots import SlotTable
from outsize.storage.stats import IOStats

COPY_SHARE = 0.5  # of a record, that its copy at fewer bits is taken to have


@dataclass(frozen=True, slots=True)
class Link:
    """The disk as a simple model, and how long computing takes meanwhile. Bytes, seconds."""

    bytes_per_s: float
    record_bytes: int
    latency_s: float = 1e-4
    layer_s: float = 0.0  # a layer without its experts, for a token
    expert_s: float = 0.0  # one expert, for a token

    def seconds(self, id: int) -> float:
        """Of reading a record, or, for ~id, its copy."""
        return self.record_bytes / self.bytes_per_s * (1.0 if id >= 0 else COPY_SHARE)


@dataclass(slots=True)
class Outcome:
    """What became of one phase's requests."""

    stats: IOStats
    tokens: int = 0
    seconds: float = 0.0


class Queue:
    """The link in time. What is read ahead waits behind what is demanded."""

    def __init__(self, link: Link) -> None:
        self._link, self._free_at = link, 0.0
        self._waiting: dict[int, float] = {}  # id to be read ahead -> since when
        self.arrival: dict[int, float] = {}

    def advance(self, now: float) -> None:
        """Begin to read ahead, as far as the link was idle."""
        while self._waiting:
            id, since = next(iter(self._waiting.items()))
            start = max(self._free_at, since)
            if start >= now:
                return
            del self._waiting[id]
            self._read(id, start)

    def prefetch(self, id: int, now: float) -> None:
        self._waiting[id] = now
        self.arrival.pop(id, None)

    def demand(self, id: int, now: float) -> None:
        self._waiting.pop(id, None)
        self._read(id, max(self._free_at, now))

    def cancel(self, ids: Iterable[int]) -> list[int]:
        """What has not begun will not; the ids of what has."""
        return [id for id in ids if self._waiting.pop(id, None) is None]

    def is_there(self, id: int, now: float) -> bool:
        return self.arrival.get(id, now + 1) <= now

    def _read(self, id: int, start: float) -> None:
        self._free_at = start + self._link.seconds(id)
        self.arrival[id] = self._free_at + self._link.latency_s


@dataclass(frozen=True, slots=True)
class ReplaySetup:
    """What a replay simulates, besides the trace."""

    policy: Policy
    capacity: int  # slots
    link: Link
    prefetcher: Prefetcher
    missing: MissHandler = fetch
    num_experts: int = 1 << 30  # of a layer
    # False: the next layer is read ahead before this one's records are placed, one by one, and each may evict
    # the others: a trap that others fell into, kept to show its size.
    leases: bool = True
    most: int | None = None  # records that may be read ahead and not yet asked for


class Replay:
    """One run of a trace's events."""

    def __init__(self, setup: ReplaySetup) -> None:
        self._setup, self._link, self._experts = setup, setup.link, setup.num_experts
        self._stats = IOStats()
        self._most, size = setup.most or most_ahead(setup.capacity), setup.link.record_bytes
        self._slot_table = SlotTable(setup.policy, self._stats, size, setup.leases)
        self._queue, self._now, self._number = Queue(setup.link), 0.0, -1
        self._uses: Counter[int] = Counter()

    def run(self, events: Sequence[Event]) -> dict[int, Outcome]:
        """The outcome of each phase."""
        out: dict[int, Outcome] = {}
        before, started, phase = IOStats(), 0.0, events[0].phase if events else 0
        for at, event in enumerate(events):
            if event.phase != phase:
                self._close(out, phase, before, started)
                before, started, phase = self._stats + IOStats(), self._now, event.phase
            found = out.setdefault(phase, Outcome(IOStats()))
            if event.number != self._number:
                self._number = event.number
                self._slot_table.begin_pass()
                found.tokens += event.tokens
            self._event(event, events[at + 1] if at + 1 < len(events) else None)
        self._close(out, phase, before, started)
        return out

    def _close(self, out: dict[int, Outcome], phase: int, before: IOStats, started: float) -> None:
        """Add what a phase did since it began."""
        found = out.setdefault(phase, Outcome(IOStats()))
        found.stats += self._stats - before
        found.seconds += self._now - started

    def _event(self, event: Event, after: Event | None) -> None:
        queue, slot_table = self._queue, self._slot_table
        self._now += self._link.layer_s * event.tokens
        queue.advance(self._now)
        chosen = self._chosen(event)
        ids = [i for i in chosen if i >= 0]
        if event.rows:
            slot_table.policy.observe(event.layer, event.rows)
        if not self._setup.leases:
            self._prefetch(event, after)
        placed = slot_table.demand(
            ids, lambda slot: queue.is_there(slot_table.id_in[slot], self._now)
        )
        for id, _ in placed.loads:
            queue.demand(id, self._now)
        for id in placed.slots:
            if id not in queue.arrival:  # to be read ahead, and not begun
                queue.demand(id, self._now)
        copies = [i for i in chosen if i < 0]
        for id in copies:
            queue.demand(id, self._now)
        if self._setup.leases:
            self._prefetch(event, after)
        slot_table.policy.finish_ranking()
        self._compute([*placed.slots, *copies], event.tokens)
        slot_table.release()

    def _chosen(self, event: Event) -> list[int]:
        """What is asked for after misses have been handled."""
        scored = list(zip(event.ids, event.weights, strict=True))
        resident = self._slot_table.slot_of
        instead = self._setup.missing(scored, resident, self._uses, self._experts)
        self._uses.update(event.ids)
        count(self._stats, event.ids, instead)
        return list(dict.fromkeys(i for i in instead if i is not None))

    def _prefetch(self, event: Event, after: Event | None) -> None:
        slot_table, queue = self._slot_table, self._queue
        stale = [i for i in slot_table.ahead if i // self._experts == event.layer]
        slot_table.cancel(stale, queue.cancel(stale))
        if after is None or after.layer == event.layer:
            return
        seen = Seen(
            event.layer, event.ids, after.layer, after.layer * self._experts, after.early, after.ids
        )
        for id, _ in slot_table.prefetch(self._setup.prefetcher(seen), self._most):
            queue.prefetch(id, self._now)

    def _compute(self, ids: Iterable[int], tokens: int) -> None:
        """Experts one after another, in the order in which they are there."""
        for arrival in sorted(self._queue.arrival[i] for i in ids):
            self._stats.waited_s += max(0.0, arrival - self._now)
            self._now = max(self._now, arrival) + self._link.expert_s * tokens
