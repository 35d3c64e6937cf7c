"""Layer streaming: a cache of records that are used in order, over and over. Some are pinned, the others pass
through a ring of slots, read ahead of their use (the policy `pin_and_ring`)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from outsize.caching.eviction.pin_and_ring import PinAndRing
from outsize.storage.reader import Reader
from outsize.storage.table import Table
from outsize.weights.residency import RecordCache, Share, SlotCounts


class ScanCache(RecordCache):
    """A ring that reads ahead in the order of the scan: all records that are not pinned, or `scan`."""

    _policy: PinAndRing

    def __init__(
        self, table: Table, reader: Reader, share: Share, scan: Sequence[int] | None = None
    ) -> None:
        self._share, self._unpinned = share, list[int]()
        rest = set(range(len(table))) - set(share.pinned) if share.ring else ()
        self._scan = sorted(rest if scan is None else scan)
        counts = SlotCounts(len(share.pinned), share.ring, share.lent)
        super().__init__(table, reader, counts)

    def _new_policy(self) -> PinAndRing:
        share = self._share
        self._policy = PinAndRing(len(share.pinned) + share.ring, share.pinned)
        for id in self._unpinned:
            self._policy.unpin(id)
        return self._policy

    def start(self) -> None:
        self.prefetch(self._scan[: self._depth])

    def release(self) -> None:
        last = self.slot_table.in_use[-1:]
        super().release()
        if self._scan and last:
            self.prefetch(self._following(last[0]))

    def _following(self, id: int) -> Sequence[int]:
        """The next ids of the scan, as many as there are slots for."""
        at = bisect_right(self._scan, id)
        return [*self._scan[at:], *self._scan[:at]][: self._depth]

    @property
    def streams(self) -> bool:
        """Are there records that pass through its ring?"""
        return bool(self._scan)

    def set_scan(self, ids: Sequence[int]) -> None:
        """From now on these are fetched in order, over and over."""
        self._scan = sorted(ids)

    def unpin(self, id: int) -> int:
        """Let a pinned record pass like the others, from the next step on; the bytes this frees."""
        self._whole.pop(self.slot_table.slot_of[id], None)
        self._unpinned.append(id)
        slot = self._policy.unpin(id)
        self.slot_table.drop(id)
        self._scan = sorted([*self._scan, id])
        if slot is None:
            self._depth = 1
            return 0
        self.slots -= 1
        self._drop_memory(slot)
        return self.table.header.stride

    def borrow_scratch(self) -> None:
        """Read further ahead."""
        if not self._borrowed:
            super().borrow_scratch()
            self._depth += len(self._borrowed)

    def return_scratch(self) -> int:
        self._depth -= len(self._borrowed)
        return super().return_scratch()

    def restore(self) -> None:
        super().restore()
        self._scan = sorted({*self._scan, *self._unpinned})
        self._depth = self._share.ring or len(self._unpinned[:1])
