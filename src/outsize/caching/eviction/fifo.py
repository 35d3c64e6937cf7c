"""First in goes first, however often it was used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from outsize.caching.order import take_first
from outsize.caching.policy import Hints, Policy, Slots


class Fifo(Slots):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[int, None] = OrderedDict()

    def used(self, id: int, is_hit: bool) -> None:
        self._order.setdefault(id)

    def victim(self, staying: Collection[int]) -> int:
        return take_first([self._order], staying)


def policy(capacity: int, hints: Hints) -> Policy:
    return Fifo(capacity)
