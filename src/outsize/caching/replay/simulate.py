"""Replays recorded routing in virtual time, through the same policies, prefetchers and accounts as the
engine: one link that reads one record after another, what is waited for first; computing in parallel.

A layer's event is atomic: all its records are placed before any of them may be a victim. Resident experts
are computed while the missing ones arrive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from outsize.caching.misses import Missing, count, fetch
from outsize.caching.policy import Policy
from outsize.caching.prefetcher import Prefetcher, Seen, most_ahead
from outsize.caching.replay.trace import Event
from outsize.caching.slots import SlotTable
from outsize.storage.stats import IOStats

COPY_SHARE = 0.5  # of a record, that its copy at fewer bits is taken to have


@dataclass(frozen=True, slots=True)
class Link:
    """What records come through, and how long computing takes meanwhile. Bytes, seconds."""

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
    """Of one phase."""

    traffic: IOStats
    tokens: int = 0
    seconds: float = 0.0


class Queue:
    """The link in time. What was expected waits behind what is demanded."""

    def __init__(self, link: Link) -> None:
        self._link, self._free_at = link, 0.0
        self._waiting: dict[int, float] = {}  # expected id -> since when
        self.arrival: dict[int, float] = {}

    def advance(self, now: float) -> None:
        """Begin what was expected, as far as the link was idle."""
        while self._waiting:
            id, since = next(iter(self._waiting.items()))
            start = max(self._free_at, since)
            if start >= now:
                return
            del self._waiting[id]
            self._read(id, start)

    def expect(self, id: int, now: float) -> None:
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


class Replay:
    """One run."""

    def __init__(
        self,
        policy: Policy,
        capacity: int,
        link: Link,
        prefetcher: Prefetcher,
        missing: Missing = fetch,
        num_experts: int = 1 << 30,
        leases: bool = True,
        most: int | None = None,
    ) -> None:
        """`leases` False: the next layer is read ahead before this one's records are placed, one by one,
        and each may evict the others: a trap that others fell into, kept to show its size. `most`: that may
        be expected at once."""
        self._link, self._prefetcher, self._missing = link, prefetcher, missing
        self._leases = leases
        self._experts, self._most = num_experts, most or most_ahead(capacity)
        self._traffic = IOStats()
        self._ledger = SlotTable(policy, self._traffic, link.record_bytes, leases)
        self._queue, self._now, self._number = Queue(link), 0.0, -1
        self._uses: Counter[int] = Counter()

    def run(self, events: Sequence[Event]) -> dict[int, Outcome]:
        """What became of each phase's requests."""
        out: dict[int, Outcome] = {}
        before, started, phase = IOStats(), 0.0, events[0].phase if events else 0
        for at, event in enumerate(events):
            if event.phase != phase:
                self._close(out, phase, before, started)
                before, started, phase = self._traffic + IOStats(), self._now, event.phase
            found = out.setdefault(phase, Outcome(IOStats()))
            if event.number != self._number:
                self._number = event.number
                self._ledger.begin_pass()
                found.tokens += event.tokens
            self._event(event, events[at + 1] if at + 1 < len(events) else None)
        self._close(out, phase, before, started)
        return out

    def _close(self, out: dict[int, Outcome], phase: int, before: IOStats, started: float) -> None:
        """Account for what a phase did since it began."""
        found = out.setdefault(phase, Outcome(IOStats()))
        found.traffic += self._traffic - before
        found.seconds += self._now - started

    def _event(self, event: Event, after: Event | None) -> None:
        queue, slot_table = self._queue, self._ledger
        self._now += self._link.layer_s * event.tokens
        queue.advance(self._now)
        chosen = self._chosen(event)
        ids = [i for i in chosen if i >= 0]
        if event.rows:
            slot_table.policy.observe(event.layer, event.rows)
        if not self._leases:
            self._expect(event, after)
        placed = slot_table.demand(
            ids, lambda slot: queue.is_there(slot_table.id_in[slot], self._now)
        )
        for id, _ in placed.loads:
            queue.demand(id, self._now)
        for id in placed.slots:
            if id not in queue.arrival:  # expected, and not begun
                queue.demand(id, self._now)
        copies = [i for i in chosen if i < 0]
        for id in copies:
            queue.demand(id, self._now)
        if self._leases:
            self._expect(event, after)
        slot_table.policy.settle()
        self._compute([*placed.slots, *copies], event.tokens)
        slot_table.release()

    def _chosen(self, event: Event) -> list[int]:
        """What is asked for after misses have been handled."""
        scored = list(zip(event.ids, event.weights, strict=True))
        resident = self._ledger.slot_of
        instead = self._missing(scored, resident, self._uses, self._experts)
        self._uses.update(event.ids)
        count(self._traffic, event.ids, instead)
        return list(dict.fromkeys(i for i in instead if i is not None))

    def _expect(self, event: Event, after: Event | None) -> None:
        slot_table, queue = self._ledger, self._queue
        stale = [i for i in slot_table.ahead if i // self._experts == event.layer]
        slot_table.give_up(stale, queue.cancel(stale))
        if after is None or after.layer == event.layer:
            return
        seen = Seen(
            event.layer, event.ids, after.layer, after.layer * self._experts, after.early, after.ids
        )
        for id, _ in slot_table.expect_some(self._prefetcher(seen), self._most):
            queue.expect(id, self._now)

    def _compute(self, ids: Iterable[int], tokens: int) -> None:
        """Experts one after another, in the order in which they are there."""
        for arrival in sorted(self._queue.arrival[i] for i in ids):
            self._traffic.waited_s += max(0.0, arrival - self._now)
            self._now = max(self._now, arrival) + self._link.expert_s * tokens
