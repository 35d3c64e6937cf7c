"""A variant that is called Least-Stale: stale ones first, but inside a pass in the order of layers."""

from __future__ import annotations

from collections.abc import Collection

from outsize.caching.order import Order
from outsize.caching.policy import Hints, Policy, Slots


class StaleLayer(Slots):
    def __init__(self, capacity: int, per_layer: int) -> None:
        super().__init__(capacity)
        self._per_layer, self._pass, self._clock, self._order = per_layer, 0, 0, Order()

    def begin_pass(self) -> None:
        self._pass += 1

    def used(self, id: int, is_hit: bool) -> None:
        self._clock += 1
        self._order.set(id, (self._pass, id // self._per_layer, self._clock))

    def victim(self, staying: Collection[int]) -> int:
        return self._order.pop(staying)


def policy(capacity: int, hints: Hints) -> Policy:
    return StaleLayer(capacity, hints.per_layer)
