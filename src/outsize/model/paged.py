"""Half a block, over weights that are held or fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from outsize.model.ffn.experts import Mixture, Router
from outsize.model.step import Step
from outsize.model.sublayer import Runnable
from outsize.storage.table import Weights
from outsize.weights.layers import LayerRecord


class PagedLayer:
    """A half whose weights are held in memory, and then built once, or fetched at each use."""

    def __init__(self, make: Callable[[Weights], Runnable], source: LayerRecord) -> None:
        self._make, self.source = make, source
        self._half = None if source.pinned is None else make(source.pinned)
        self._built: dict[int, tuple[Weights, Runnable]] = {}

    @property
    def is_held(self) -> bool:
        return self._half is not None

    def __call__(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        """Run all chunks, in order. Changes their tensors."""
        if self._half is not None:
            self._half.run(chunks)
            return
        with self.source as weights:
            self._in_slot(weights).run(chunks)

    @property
    def held(self) -> Runnable | None:
        """What was built once, if its weights are held."""
        return self._half

    def _in_slot(self, weights: Weights) -> Runnable:
        """The half built over a slot's views. The same record in the same slot needs no new one."""
        found = self._built.get(id(weights))
        if found is None:
            found = self._built[id(weights)] = weights, self._make(weights)
        return found[1]

    def unpin(self) -> int:
        """Fetch the weights from now on; the bytes this frees."""
        self._half = None
        return self.source.unpin()


def link(parts: Sequence[PagedLayer]) -> None:
    """Each layer of experts may ask the next one's router, where that is in memory."""

    def router(part: PagedLayer) -> Router | None:
        return part.held.router if isinstance(part.held, Mixture) else None

    for i, part in enumerate(parts):
        if isinstance(part.held, Mixture):
            part.held.ahead = partial(router, parts[(i + 1) % len(parts)])
