"""FIFO: first in is evicted first, however often it was used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from outsize.caching.order import take_first
from outsize.caching.policy import EvictionPolicy, Hints


class Fifo(EvictionPolicy):
    def __init__(self, capacity: int, hints: Hints) -> None:
        super().__init__(capacity, hints)
        self._order: OrderedDict[int, None] = OrderedDict()

    def used(self, id: int) -> None:
        self._order.setdefault(id)

    def victim(self, staying: Collection[int]) -> int:
        return take_first([self._order], staying)


policy = Fifo
