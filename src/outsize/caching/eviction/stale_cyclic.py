"""A variant that is called Least-Stale: the layer that is farthest ahead in the cycle of layers goes first,
in it the least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from outsize.caching.order import take_first
from outsize.caching.policy import EvictionPolicy, Hints


class StaleCyclic(EvictionPolicy):
    def __init__(self, capacity: int, hints: Hints) -> None:
        super().__init__(capacity, hints)
        self._per_layer, self._layer = hints.per_layer, 0
        self._of_layer = [OrderedDict[int, None]() for _ in range(hints.layers)]

    def used(self, id: int) -> None:
        layer = id // self._per_layer
        if not self.is_ahead:
            self._layer = layer
        self._of_layer[layer].pop(id, None)
        self._of_layer[layer][id] = None

    def victim(self, staying: Collection[int]) -> int:
        count = len(self._of_layer)
        # This layer comes again last, the one before it next to last, ...
        farthest = (self._of_layer[(self._layer - back) % count] for back in range(count))
        return take_first(farthest, staying)


policy = StaleCyclic
