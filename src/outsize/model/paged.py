"""A paged sub-layer: half a layer (attention, or feed-forward) whose weights are in memory, or are fetched
from disk each time it runs. A model is a list of them; what runs them (forward/full.py) need not know which
is which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from outsize.model.ffn.experts import Gate, Mixture
from outsize.model.ffn.nested import NestedExperts
from outsize.model.half import Runnable
from outsize.model.step import Step
from outsize.storage.table import Weights
from outsize.weights.layers import LayerRecord


class PagedLayer:
    """One sub-layer and where its weights come from. Resident weights: it is built once, and running it costs
    nothing more. Otherwise it is built over each buffer slot that the weights are read into, once a slot."""

    def __init__(self, make: Callable[[Weights], Runnable], source: LayerRecord | None) -> None:
        """`make` builds the sub-layer over weights in memory. `source` None: it has none of its own."""
        self._make, self.source = make, source
        pinned = {} if source is None else source.pinned
        self._resident = None if pinned is None else make(pinned)
        self._by_slot: dict[int, tuple[Weights, Runnable]] = {}
        self.narrow: Runnable | None = None  # runs steps of few rows in its place

    @property
    def is_resident(self) -> bool:
        """Are its weights resident?"""
        return self._resident is not None

    @property
    def resident(self) -> Runnable | None:
        """The sub-layer, if its weights are resident."""
        return self._resident

    def __call__(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        """Run all chunks of rows, in order, with the weights fetched once. Changes the residual streams (T,
        D)."""
        if self.narrow is not None:
            self.narrow.run([chunk for chunk in chunks if not chunk[1].wide])
            chunks = [chunk for chunk in chunks if chunk[1].wide]
            if not chunks:
                return
        if self._resident is not None:
            self._resident.run(chunks)
            return
        assert self.source is not None
        with self.source as weights:
            self._in_slot(weights).run(chunks)

    def _in_slot(self, weights: Weights) -> Runnable:
        """The sub-layer over a slot's views: another record in the same slot needs no new one."""
        found = self._by_slot.get(id(weights))
        if found is None:
            found = self._by_slot[id(weights)] = weights, self._make(weights)
        return found[1]

    def unpin(self) -> int:
        """Fetch the weights from now on; the bytes that this frees."""
        if self.source is None:
            return 0
        self._resident = None
        return self.source.unpin()


def link(layers: Sequence[PagedLayer]) -> None:
    """Each mixture may ask the next one's router early, where that is in memory; nested experts likewise."""

    def router(layer: PagedLayer) -> Gate | None:
        return layer.resident.router if isinstance(layer.resident, Mixture) else None

    def nested(layer: PagedLayer) -> NestedExperts | None:
        return layer.resident if isinstance(layer.resident, NestedExperts) else None

    for i, layer in enumerate(layers):
        after = layers[(i + 1) % len(layers)]
        if isinstance(layer.resident, Mixture):
            layer.resident.ahead = partial(router, after)
        if isinstance(layer.resident, NestedExperts):
            layer.resident.ahead = partial(nested, after)
