"""A variant that is called Least-Stale: stale ones first, but inside a pass in the order of layers."""

from __future__ import annotations

from collections.abc import Collection

from outsize.caching.order import Order
from outsize.caching.policy import EvictionPolicy, Hints


class StaleLayer(EvictionPolicy):
    def __init__(self, capacity: int, hints: Hints) -> None:
        super().__init__(capacity, hints)
        self._per_layer, self._pass, self._clock, self._order = hints.per_layer, 0, 0, Order()

    def begin_pass(self) -> None:
        self._pass += 1

    def used(self, id: int) -> None:
        self._clock += 1
        self._order.set(id, (self._pass, id // self._per_layer, self._clock))

    def victim(self, staying: Collection[int]) -> int:
        return self._order.pop(staying)


policy = StaleLayer
