"""The weights of an opened model at this moment: what of each layer is in memory, and what was read since the
last look. For a live picture: the engine counts anyway, and whoever looks takes the differences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from outsize.engine.model import Model
from outsize.plan.placement import BY_ID, BY_ROUTER, BY_TOKEN, DISK, MEMORY
from outsize.storage.stats import IOStats
from outsize.storage.table import Table
from outsize.weights.experts import ExpertBank
from outsize.weights.layers import LayerRecord
from outsize.weights.load import Loaded
from outsize.weights.rows import RowTable
from outsize.weights.tokens import TokenTable

# Of an expert: not in memory, there, and, if it was asked for since the last look, what became of most
# requests: it was there, was read ahead in time, or too late, or was missing.
ABSENT, THERE, HIT, READY, LATE, COLD = ".-hrlc"


@dataclass(frozen=True, slots=True)
class Part:
    """Records of a table that a picture shows as one: a layer's attention, feed-forward or experts, or an
    embedding."""

    name: str
    layer: int | None
    table: Table
    records: range
    source: LayerRecord | ExpertBank | RowTable | TokenTable

    @property
    def size(self) -> int:
        return len(self.records) * self.table.header.stride


def parts_of(loaded: Loaded) -> Iterator[Part]:
    """All of a model's weights, in the order in which a token meets them."""
    embed, head = loaded.embed, loaded.head
    banks = {bank.layer: bank for bank in loaded.banks}
    yield Part("embedding", None, embed.table, range(len(embed.table)), embed)
    if loaded.tokens is not None:
        table = loaded.tokens.cache.table
        yield Part("rows by token", None, table, range(len(table)), loaded.tokens)
    for layer, (attention, ffn) in enumerate(loaded.layers):
        bank = banks.get(layer)
        names = ("attention", "feed-forward" if bank is None else "router")
        for name, source in zip(names, (attention, ffn), strict=True):
            if source is None:  # all of it is looked up
                continue
            table = source.cache.table
            yield Part(name, layer, table, range(source.index, source.index + 1), source)
        if bank is not None:
            first = bank.number * bank.count
            yield Part("experts", layer, bank.cache.table, range(first, first + bank.count), bank)
    if head is not embed:
        yield Part("head", None, head.table, range(len(head.table)), head)


class WeightsNow:
    """Looks at a model's weights again and again. Raises ClosedError once the model is closed."""

    def __init__(self, model: Model) -> None:
        loaded = model.transformer.loaded
        self._model, self._parts = model, list(parts_of(loaded))
        self._banks = loaded.banks
        self._read, self._counts = self._bytes_read(), self._traffic()
        self._asked = [self._outcomes(bank) for bank in self._banks]

    def parts(self) -> list[dict[str, object]]:
        """What there is, once: each part's name, layer, bytes, tier."""
        by_id = self._parts[-1].name == "head"  # then an embedding is only ever read by rows
        rests = {
            "experts": BY_ROUTER,
            "rows by token": BY_TOKEN,
            "embedding": BY_ID if by_id else DISK,
        }
        return [
            {
                "part": part.name,
                "layer": part.layer,
                "bytes": part.size,
                "records": len(part.records),
                "tier": MEMORY if held == 1 else rests.get(part.name, DISK),
            }
            for part, held in zip(self._parts, self._held(), strict=True)
        ]

    def look(self) -> dict[str, object]:
        """Since the last look, by part: bytes and records read; the share that is in memory now; hits and
        misses in all."""
        read, counts = self._bytes_read(), self._traffic()
        new = [now - before for now, before in zip(read, self._read, strict=True)]
        asked = counts - self._counts
        self._read, self._counts = read, counts
        strides = [part.table.header.stride for part in self._parts]
        return {
            "read_bytes": new,
            "read_records": [-(-size // each) for size, each in zip(new, strides, strict=True)],
            "held": [round(share, 4) for share in self._held()],
            "hits": int(asked.hits),
            "misses": int(asked.misses),
            "waited_s": round(asked.waited_s, 4),
            "experts": [self._experts(i, bank) for i, bank in enumerate(self._banks)],
        }

    def _held(self) -> Iterator[float]:
        """By part, the share that is in memory. Layers on their way through a ring are not."""
        experts: dict[int, Counter[int]] = {}  # by cache: of each layer, how many are there
        for part in self._parts:
            source = part.source
            if isinstance(source, LayerRecord):
                yield float(source.pinned is not None)
            elif isinstance(source, RowTable):
                yield 1.0 if source.is_resident else source.resident_bytes / part.size
            elif isinstance(source, TokenTable):
                yield len(source.cache.slot_table.slot_of) / len(part.records)
            else:
                cache, count = source.cache, source.count
                if id(cache) not in experts:
                    there = list(cache.slot_table.slot_of)
                    experts[id(cache)] = Counter(i // count for i in there)
                yield experts[id(cache)][source.number] / count

    def _bytes_read(self) -> list[int]:
        tables = {id(part.table): part.table.bytes_of.tolist() for part in self._parts}
        return [sum(tables[id(p.table)][p.records.start : p.records.stop]) for p in self._parts]

    def _traffic(self) -> IOStats:
        """Of experts, where there are any: only they are missed by chance."""
        counts = self._model.counts()
        return counts.experts if self._banks else counts.total

    def _experts(self, place: int, bank: ExpertBank) -> str:
        """One letter an expert of this layer."""
        before, now = self._asked[place], self._outcomes(bank)
        self._asked[place] = now
        first, there = bank.number * bank.count, bank.cache.slot_table.slot_of
        letters = [THERE if first + e in there else ABSENT for e in range(bank.count)]
        for e in range(bank.count):
            new = [y[e] - x[e] for x, y in zip(before, now, strict=True)]
            if any(new):
                letters[e] = max(zip(new, range(4), (HIT, READY, LATE, COLD), strict=True))[2]
        return "".join(letters)

    def _outcomes(self, bank: ExpertBank) -> Sequence[Sequence[int]]:
        first, all = bank.number * bank.count, bank.cache.outcomes
        kinds = (all.hits, all.ready, all.late, all.missed)
        return [kind[first : first + bank.count] for kind in kinds]
