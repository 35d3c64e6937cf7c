"""Window: what the last k tokens used stays, for the largest k that fits (LLM in a flash, section 3.1,
whose k shrinks where the memory is too small).

The victim is of the token longest ago; among those, of the layer whose next visit is farthest. Of a step that
checks draft tokens, only the first ALPHA of its rows count as used now, since the others will likely be
rejected (section 3.4 keeps the last k tokens that end at token alpha * (draft tokens + 1)).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from outsize.caching.policy import EvictionPolicy, Hints

ALPHA = 0.6  # of a step's rows


class Window(EvictionPolicy):
    def __init__(self, capacity: int, hints: Hints) -> None:
        super().__init__(capacity, hints)
        self._per_layer, self._pass, self._layer = hints.per_layer, 0, 0
        self._last: dict[int, int] = {}  # by resident id: the pass of its last use
        # By pass and layer, its residents: so that a victim is found without looking at all of them.
        self._of: dict[int, dict[int, dict[int, None]]] = {}
        self._doubtful: frozenset[int] = frozenset()  # of rows that will likely be rejected

    def begin_pass(self) -> None:
        self._pass += 1

    def observe(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        self._layer = layer
        kept = rows[: max(1, math.ceil(ALPHA * len(rows)))]
        sure = {i for row in kept for i in row}
        self._doubtful = frozenset(i for row in rows for i in row) - sure

    def used(self, id: int) -> None:
        before = self._last.get(id)
        number = self._pass - 1 if id in self._doubtful else self._pass
        number = number if before is None else max(before, number)
        if before == number:
            return
        self._forget(id)
        self._last[id] = number
        self._of.setdefault(number, {}).setdefault(id // self._per_layer, {})[id] = None

    def _forget(self, id: int) -> None:
        number = self._last.pop(id, None)
        if number is None:
            return
        layers, layer = self._of[number], id // self._per_layer
        del layers[layer][id]
        if not layers[layer]:
            del layers[layer]
        if not layers:
            del self._of[number]

    def victim(self, staying: Collection[int]) -> int:
        for number in sorted(self._of):
            layers = self._of[number]
            for layer in sorted(layers, key=self._until, reverse=True):
                for id in layers[layer]:
                    if id not in staying:
                        self._forget(id)
                        return id
        raise AssertionError("more ids stay than there are slots")

    def _until(self, layer: int) -> tuple[bool, int]:
        """How far off a layer's next visit is: those visited in this pass come after those that will be."""
        return layer <= self._layer, layer


policy = Window
