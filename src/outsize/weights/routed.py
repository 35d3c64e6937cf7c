"""Records that a router names, as experts: an eviction policy fills so many slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outsize.caching.policy import Policy
from outsize.storage.reader import Reader
from outsize.storage.table import Table
from outsize.weights.residency import RecordCache, SlotCounts


class RoutedCache(RecordCache):
    """Slots that an eviction policy fills, and those that are lent, if it is one that pins."""

    def __init__(
        self,
        table: Table,
        reader: Reader,
        make_policy: Callable[[], Policy],
        slots: int,
        lent: int = 0,
        scatters: bool = False,
    ) -> None:
        """`scatters`: neighbours in the file that are missing are read at once."""
        self._scatters = scatters
        self._make_policy, self._num_dropped = make_policy, 0
        is_resident = slots == len(table)  # then they are filled once
        super().__init__(
            table, reader, SlotCounts(slots, 0) if is_resident else SlotCounts(0, slots, lent)
        )
        self._depth = slots

    def _new_policy(self) -> Policy:
        policy = self._make_policy()
        for _ in range(self._num_dropped):  # no more slots than before, maybe others
            if (found := policy.drop_slot(0)) is not None:
                self._whole.pop(found[0], None)
                self._drop_memory(found[0])
        return policy

    def there(self, ids: range) -> list[int]:
        """Those that are in memory now. Nothing is counted as asked for."""
        slots = self.slot_table.slot_of
        return [i for i in ids if i in slots and self._whole.get(slots[i]) == i]

    def look(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As `locate`, of those that are there: nothing is counted, and no policy hears of it."""
        slots = [self.slot_table.slot_of[i] for i in ids]
        first, pool = self._pool(slots[0])
        places = [slot - first for slot in slots]
        return pool.rows(), torch.tensor(places, dtype=torch.int64, device="cpu")

    def shrink(self, size: int, least: int) -> int:
        """Drop slots until `size` bytes are free, or `least` slots are left; the bytes this frees."""
        freed = 0
        while freed < size and (found := self.slot_table.policy.drop_slot(least)) is not None:
            slot, id = found
            if id is not None:
                self.slot_table.drop(id)
            self._empty(slot)
            self.slots -= 1
            self._drop_memory(slot)
            self._num_dropped += 1
            freed += self.table.header.stride
        return freed
