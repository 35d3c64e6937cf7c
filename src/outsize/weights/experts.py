"""The table kind "experts": a record is one expert of one layer, and all layers share one cache. An expert
bank is one layer's view of it: the router asks for experts, and some are prefetched for the next layer
(SpecMD, arXiv 2602.03921).

Ids count through the layers of a table: layer * count + expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from outsize.caching.misses import count, fetch
from outsize.caching.policy import Hints, make
from outsize.caching.prefetcher import Scored, Seen, most_ahead
from outsize.pack.format import Pack
from outsize.pack.kinds.experts import KIND
from outsize.storage.table import Weights, activation_type
from outsize.weights.open_pack import OpenPack
from outsize.weights.routed import RoutedCache
from outsize.weights.spec import PROFILED, CacheSettings

Later = Sequence[tuple["ExpertBank", int]]  # layers, and how many of their first experts


class Copies(NamedTuple):
    """A layer's experts at fewer bits: its first one is record `base` of the cache."""

    cache: RoutedCache
    base: int


@dataclass(slots=True)
class ExpertBank:
    """The experts of one layer, by number. `number`: the layer's place in its table; `ordinal`: among all
    layers that have experts, by which traces know them; `following`: the next such layer's bank."""

    cache: RoutedCache
    activation_type: torch.dtype
    layer: int
    number: int
    count: int
    settings: CacheSettings
    ordinal: int = 0
    following: ExpertBank | None = None
    copies: Copies | None = None

    @property
    def is_held(self) -> bool:
        """Are all experts of all layers in memory, for as long as memory does not get short?"""
        return self.cache.slots == len(self.cache.table)

    def held(self) -> list[Weights]:
        """All of them; valid while they are held."""
        base = self.number * self.count
        found = self.cache.fetch(range(base, base + self.count))
        self.cache.release()
        return found

    def count_hits(self, count: int) -> None:
        """So many were used, of those that are held."""
        self.cache.stats.hits += count

    def stream(
        self, rows: Sequence[Sequence[int]], early: Scored, in_order: bool
    ) -> Iterator[list[tuple[int, Weights]]]:
        """The experts that these tokens chose (`rows`: by token), as they arrive; `early`: the scores of the
        next layer's gate, asked now. `in_order`: by their numbers, so that a prompt's sums do not depend
        on who else is in the step. ~e is the copy of e."""
        base = self.number * self.count
        chosen = list(dict.fromkeys(e for row in rows for e in row))
        chosen = sorted(chosen) if in_order else chosen
        ids, copies = [base + e for e in chosen if e >= 0], [~e for e in chosen if e < 0]
        self._observe([[base + (e if e >= 0 else ~e) for e in row] for row in rows])

        def then() -> None:
            self._then(ids, early)

        self._prefetch_copies(copies)
        room = self.cache.slot_table.policy.room
        for at in range(0, len(ids), room):
            wave, last = ids[at : at + room], at + room >= len(ids)
            for found in self.cache.stream(wave, in_order, then if last else self._cancel_stale):
                yield [(id - base, weights) for id, weights in found]
            self.cache.release()
        yield from self._copied(copies, in_order)

    def first(self, rows: Sequence[int], early: Scored, later: Later = ()) -> list[Weights]:
        """The first few experts, as many as some token uses (`rows`: by token), all at once; valid until
        `release`. None of them where there is no room for so many. `later`: how many of the layers after the
        next are likely to be wanted."""
        base, most = self.number * self.count, max(rows)
        if most > self.cache.slot_table.policy.room:
            return []
        self._observe([range(base, base + n) for n in rows])
        ids = range(base, base + most)
        return self.cache.fetch(ids, lambda: self._then(ids, early, later))

    def release(self) -> None:
        """What `first` gave has been used."""
        self.cache.release()

    def _observe(self, wanted: Sequence[Sequence[int]]) -> None:
        """Records that each token asks for."""
        self.cache.slot_table.policy.observe(self.number, wanted)
        self.settings.uses.update({e for row in wanted for e in row})

    def _then(self, ids: Sequence[int], early: Scored, later: Later = ()) -> None:
        """These are being read: so is what the next layer wants, and then what later ones are likely to."""
        self._prefetch_next(ids, early)
        passes = (
            self.cache.slot_table.policy.room < self.cache.slots
        )  # what is read ahead evicts nothing kept
        for bank, used in later if passes and self.settings.prefetcher is not None else ():
            if not bank.prefetch_first(used):
                break
        self.cache.slot_table.policy.finish_ranking()

    def _copied(self, chosen: Sequence[int], in_order: bool) -> Iterator[list[tuple[int, Weights]]]:
        """Their copies at fewer bits, which are being read by then."""
        if self.copies is None or not chosen:
            return
        cache, base = self.copies
        room = cache.slot_table.policy.room
        for at in range(0, len(chosen), room):
            wave = [base + e for e in chosen[at : at + room]]
            for found in cache.stream(wave, in_order):
                yield [(~(id - base), weights) for id, weights in found]
            cache.release()

    def _prefetch_copies(self, chosen: Sequence[int]) -> None:
        """So that they are read while the others are computed."""
        if self.copies is not None:
            cache, base = self.copies
            cache.prefetch([base + e for e in chosen])

    def routing_bias(self) -> torch.Tensor | None:
        """(N,) added to each expert's logit, in ranges of the logits, for being resident (lossy); None:
        routing is the model's own."""
        if not self.settings.routing_bias:
            return None
        base, there = self.number * self.count, self.cache.slot_table.slot_of
        biases = [self.settings.routing_bias * (base + e in there) for e in range(self.count)]
        return torch.tensor(biases, dtype=torch.float32, device="cpu")

    def resolve_misses(
        self, rows: list[list[int]], weights: list[list[float]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Each token's experts and weights after misses were handled; the same when they are fetched."""
        if self.settings.missing is fetch:
            return rows, weights
        base = self.number * self.count
        best: dict[int, float] = {}
        for ids, ws in zip(rows, weights, strict=True):
            for e, w in zip(ids, ws, strict=True):
                best[base + e] = max(w, best.get(base + e, 0.0))
        instead = self.settings.missing(
            list(best.items()), self.cache.slot_table.slot_of, self.settings.uses, self.count
        )
        count(self.cache.stats, list(best), instead)
        new = {w - base: _local(i, base) for w, i in zip(best, instead, strict=True)}
        kept = [
            [(new[e], w) for e, w in zip(ids, ws, strict=True)]
            for ids, ws in zip(rows, weights, strict=True)
        ]
        return (
            [[e for e, _ in row if e is not None] for row in kept],
            [[w for e, w in row if e is not None] for row in kept],
        )

    def _cancel_stale(self) -> None:
        """What was prefetched for this layer and not asked for is not read any more."""
        stale = [i for i in self.cache.slot_table.ahead if i // self.count == self.number]
        if stale:
            self.cache.cancel(stale)

    def prefetch_first(self, count: int) -> bool:
        """Read the first few experts ahead, all that are missing or none: is there room for them?"""
        table, base = self.cache.slot_table, self.number * self.count
        missing = [i for i in range(base, base + count) if i not in table.slot_of]
        if len(table.ahead) + len(table.in_use) + len(missing) > table.policy.room:
            return False
        if missing:
            self.cache.prefetch_some(missing, table.policy.room)
        return True

    def _prefetch_next(self, ids: Sequence[int], early: Scored) -> None:
        self._cancel_stale()
        prefetcher, after = self.settings.prefetcher, self.following
        if prefetcher is not None and after is not None:
            wanted = prefetcher(
                Seen(self.ordinal, ids, after.ordinal, after.number * after.count, early)
            )
            slots, room = after.cache.slots, after.cache.slot_table.policy.room
            most = room if room < slots else most_ahead(slots)
            after.cache.prefetch_some(wanted, most)


def _local(id: int | None, base: int) -> int | None:
    """An id, or ~id, as one of a layer's."""
    if id is None:
        return None
    return id - base if id >= 0 else ~(~id - base)


def load(pack: OpenPack) -> tuple[ExpertBank, ...]:
    """Every layer's expert bank, in order. A table whose records all have slots is read now."""
    mixture, options = pack.pack.description.mixture, pack.plan.experts
    assert mixture is not None
    count, banks = mixture.count, dict[int, ExpertBank]()
    for table, share in pack.open("experts", pack.expert_stats):
        header, slots = table.header, max(1, share.ring)
        place = {key: at for at, key in enumerate(header.keys)}
        ranked = [place[key] for key in options.ranked if key in place]
        hints = Hints(per_layer=count, layers=len(table) // count, ranked=ranked)
        lent = share.lent if options.eviction == PROFILED else 0
        cache = RoutedCache(table, pack.reader, partial(options.policy, slots, hints), slots, lent)
        pack.caches.append(cache)
        if slots == len(table):
            cache.load(range(len(table)), pack.on_read)
        dtype, settings = activation_type(header.tensors["gate_up"]), options.settings(count)
        for number, key in enumerate(header.keys[::count]):
            layer = key // count
            banks[layer] = ExpertBank(cache, dtype, layer, number, count, settings)
    ordered = tuple(banks[layer] for layer in sorted(banks))
    for ordinal, bank in enumerate(ordered):
        bank.ordinal, bank.following = ordinal, ordered[(ordinal + 1) % len(ordered)]
    if pack.plan.copies is not None:
        _load_copies(pack, pack.plan.copies, banks)
    return ordered


def _load_copies(pack: OpenPack, copies: Pack, banks: Mapping[int, ExpertBank]) -> None:
    """Give each bank its copies: another pack's experts, which pass through as few slots as there can be."""
    for header in (t for t in copies.tables if t.kind == "experts"):
        slots = KIND.least_slots(copies.description, header)
        table = pack.open_table(copies, header, pack.stats)
        cache = RoutedCache(table, pack.reader, partial(make, "lru", slots, Hints()), slots)
        pack.caches.append(cache)
        count = next(iter(banks.values())).count
        for at in range(0, len(header.keys), count):
            banks[header.keys[at] // count].copies = Copies(cache, at)
