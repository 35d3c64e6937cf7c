"""One layer's experts, in slots that all layers share: asked for by the router, some read ahead.

Ids count through the layers of a table: layer * count + expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from outsize.caching.misses import Missing, count, fetch
from outsize.caching.prefetcher import Prefetcher, Scored, Seen, most_ahead
from outsize.storage.table import Weights
from outsize.weights.cached import Cached

Recorder = Callable[[int, Sequence[Sequence[int]], Sequence[Sequence[float]], Scored], None]


@dataclass(slots=True)
class ExpertHandling:
    """How experts are cached, for all layers of a model."""

    prefetcher: Prefetcher | None = None
    missing: Missing = fetch
    favour: float = (
        0.0  # of experts in memory when choosing, in ranges of the gate's logits (lossy)
    )
    uses: Counter[int] = field(default_factory=Counter)
    recorder: Recorder | None = None  # told of every layer's choices


class Copies(NamedTuple):
    """A layer's experts at fewer bits: its first one is record `base` of the cache."""

    cache: Cached
    base: int


@dataclass(slots=True)
class ExpertBank:
    """The experts of one layer. `number`: the layer's place in its table; `following`: the next layer's."""

    cache: Cached
    activation_type: torch.dtype
    capacity: int  # slots, of all layers together
    layer: int
    number: int
    count: int
    handling: ExpertHandling
    following: ExpertBank | None = None
    copies: Copies | None = None

    def stream(
        self, rows: Sequence[Sequence[int]], early: Scored, in_order: bool
    ) -> Iterator[list[tuple[int, Weights]]]:
        """The experts that these tokens chose, as they are there; `early`: what the next layer's gate makes
        of its experts already now. `in_order`: as they were first chosen. ~e is the copy of e."""
        base, slot_table = self.number * self.count, self.cache.slot_table
        chosen = list(dict.fromkeys(e for row in rows for e in row))
        ids, copies = [base + e for e in chosen if e >= 0], [~e for e in chosen if e < 0]
        wanted = [[base + (e if e >= 0 else ~e) for e in row] for row in rows]
        slot_table.policy.observe(self.number, wanted)
        self.handling.uses.update({e for row in wanted for e in row})

        def then() -> None:
            self._look_ahead(ids, early)
            slot_table.policy.settle()

        self._begin(copies)
        room = slot_table.policy.room
        for at in range(0, len(ids), room):
            wave, last = ids[at : at + room], at + room >= len(ids)
            for found in self.cache.stream(wave, in_order, then if last else self._forget):
                yield [(id - base, weights) for id, weights in found]
            self.cache.release()
        yield from self._copied(copies, in_order)

    def _copied(self, chosen: Sequence[int], in_order: bool) -> Iterator[list[tuple[int, Weights]]]:
        """Copies at fewer bits; by then they are being read."""
        if self.copies is None or not chosen:
            return
        cache, base = self.copies
        room = cache.slot_table.policy.room
        for at in range(0, len(chosen), room):
            wave = [base + e for e in chosen[at : at + room]]
            for found in cache.stream(wave, in_order):
                yield [(~(id - base), weights) for id, weights in found]
            cache.release()

    def _begin(self, chosen: Sequence[int]) -> None:
        """Copies are on their way while the others are computed."""
        if self.copies is not None:
            cache, base = self.copies
            cache.prefetch([base + e for e in chosen])

    def favour(self) -> torch.Tensor | None:
        """(N,) by how much each expert is favoured for being in memory; None: routing is the model's own."""
        if not self.handling.favour:
            return None
        base, there = self.number * self.count, self.cache.slot_table.slot_of
        favours = [self.handling.favour * (base + e in there) for e in range(self.count)]
        return torch.tensor(favours, dtype=torch.float32, device="cpu")

    def handled(
        self, rows: list[list[int]], weights: list[list[float]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The choices after misses were handled. A no-op when they are fetched."""
        if self.handling.missing is fetch:
            return rows, weights
        base, traffic = self.number * self.count, self.cache.traffic
        best: dict[int, float] = {}
        for ids, ws in zip(rows, weights, strict=True):
            for e, w in zip(ids, ws, strict=True):
                best[base + e] = max(w, best.get(base + e, 0.0))
        instead = self.handling.missing(
            list(best.items()), self.cache.slot_table.slot_of, self.handling.uses, self.count
        )
        count(traffic, list(best), instead)
        new = {w - base: _local(i, base) for w, i in zip(best, instead, strict=True)}
        kept = [
            [(new[e], w) for e, w in zip(ids, ws, strict=True)]
            for ids, ws in zip(rows, weights, strict=True)
        ]
        return (
            [[e for e, _ in row if e is not None] for row in kept],
            [[w for e, w in row if e is not None] for row in kept],
        )

    def _forget(self) -> None:
        """What was expected of this layer and not asked for is not expected any more."""
        stale = [i for i in self.cache.slot_table.ahead if i // self.count == self.number]
        if stale:
            self.cache.give_up(stale)

    def _look_ahead(self, ids: Sequence[int], early: Scored) -> None:
        self._forget()
        prefetcher, after = self.handling.prefetcher, self.following
        if prefetcher is not None and after is not None:
            wanted = prefetcher(
                Seen(self.layer, ids, after.layer, after.number * after.count, early)
            )
            after.cache.expect(wanted, most_ahead(after.capacity))


def _local(id: int | None, base: int) -> int | None:
    """An id, or ~id, as one of a layer's."""
    if id is None:
        return None
    return id - base if id >= 0 else ~(~id - base)
