"""A variant that is called Least-Stale: the layer that is farthest ahead in the cycle of layers goes first,
in it the least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from outsize.weights.policy import Hints, Policy, Slots


class StaleCyclic(Slots):
    def __init__(self, capacity: int, hints: Hints) -> None:
        super().__init__(capacity)
        self._per_layer, self._layer = hints.per_layer, 0
        self._of_layer = [OrderedDict[int, None]() for _ in range(hints.layers)]

    def used(self, id: int, is_hit: bool) -> None:
        layer = id // self._per_layer
        if not self.is_ahead:
            self._layer = layer
        self._of_layer[layer].pop(id, None)
        self._of_layer[layer][id] = None

    def victim(self, staying: Collection[int]) -> int:
        count = len(self._of_layer)
        for back in range(count):  # this layer comes again last, then the one before it, ...
            queue = self._of_layer[(self._layer - back) % count]
            for id in queue:
                if id not in staying:
                    del queue[id]
                    return id
        raise AssertionError("more slots stay than there are")


def policy(capacity: int, hints: Hints) -> Policy:
    return StaleCyclic(capacity, hints)
