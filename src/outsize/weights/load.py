"""A pack's tables -> the weights of a transformer: some held in memory, the others fetched at each use."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from outsize.caching.eviction.pin_and_ring import PinAndRing
from outsize.caching.policy import Hints, make
from outsize.kernels.backend import Backend
from outsize.pack.format import Matrix, Pack, TableHeader
from outsize.storage.reader import Reader
from outsize.storage.stats import IOStats
from outsize.storage.table import Table, Weight, Weights
from outsize.weights.cached import Cached, Tick
from outsize.weights.experts import Copies, ExpertBank
from outsize.weights.rows import RowTable, join
from outsize.weights.spec import ExpertOptions

Progress = Callable[[str, int, int], None]
LEAST_EXPERTS = 2  # times those that a token uses: slots that there must be


@dataclass(frozen=True, slots=True)
class Share:
    """What of a table stays in memory: record numbers, and slots for the others to pass through."""

    pinned: tuple[int, ...]
    ring: int
    lent: int = 0  # more slots, while no long span needs its scratch


Shares = Mapping[str, Share]


def least_slots(header: TableHeader, used: int) -> int:
    """The fewest for a table of experts; copies get no more. `used`: by a token in a layer."""
    return min(len(header.keys), LEAST_EXPERTS * used)


def all_of(header: TableHeader) -> Share:
    """Everything held."""
    if header.kind == "experts":
        return Share((), len(header.keys))
    return Share(tuple(range(len(header.keys))), 0)


@dataclass(slots=True)
class Source:
    """One layer's record. `pinned`: in memory, for as long as it is; None: to be fetched."""

    residency: Cached
    index: int
    pinned: Weights | None

    def __enter__(self) -> Weights:
        return self.residency.fetch([self.index])[0]

    def __exit__(self, *error: object) -> None:
        self.residency.release()

    def unpin(self) -> int:
        """Fetch it from now on; the bytes this frees."""
        self.pinned = None
        return self.residency.unpin(self.index)


@dataclass(slots=True)
class Loaded:
    """Everything a transformer is built from; close it."""

    embed: RowTable
    head: RowTable
    layers: tuple[tuple[Source, Source], ...]  # attention, feed-forward
    final_norm: Weights
    banks: tuple[ExpertBank, ...]  # each layer's experts, if it has any
    reader: Reader
    tables: list[Table]
    caches: list[Cached]
    activation_type: torch.dtype
    traffic: IOStats
    expert_traffic: IOStats

    def restore(self) -> None:
        """After a call that an exception broke off, wherever that was: what is held stays, and of the rest
        only what is surely there is known."""
        self.reader.restart()
        made = (rows.cached for rows in (self.embed, self.head))  # when rows were given up
        self.caches += [c for c in made if c is not None and c not in self.caches]
        for cache in self.caches:
            cache.restore()

    def close(self) -> None:
        """End the threads and give back the files. Nothing is being read once the reader is closed, so that
        buffers may go."""
        self.reader.close()
        for table in self.tables:
            table.close()

    def close_with(self, owner: object) -> Callable[[], None]:
        """Close when nothing refers to `owner` any more, or when what this returns is called. Not at
        the exit, where other threads may still compute, nor in a fork, which has no threads to end."""
        end = weakref.finalize(owner, _close_in, os.getpid(), self.close)
        end.atexit = False
        return end


def _close_in(process: int, close: Callable[[], None]) -> None:
    if os.getpid() == process:
        close()


@dataclass(slots=True)
class _Loading:
    """The state of one load."""

    pack: Pack
    backend: Backend
    traffic: IOStats
    verify: str
    tick: Tick
    experts: ExpertOptions
    expert_traffic: IOStats = field(default_factory=IOStats)
    reader: Reader = field(init=False)
    tables: list[Table] = field(default_factory=list)
    caches: list[Cached] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reader = Reader(backend=self.backend)

    def open(self, header: TableHeader) -> Table:
        traffic = self.expert_traffic if header.kind == "experts" else self.traffic
        table = Table(self.pack.path, header, traffic, self.verify)
        self.tables.append(table)
        return table

    def cached(self, table: Table, share: Share) -> Cached:
        capacity = len(share.pinned) + share.ring
        anew = partial(PinAndRing, capacity, share.pinned)
        scan = sorted(set(range(len(table))) - set(share.pinned)) if share.ring else []
        made = Cached(
            table, self.reader, self.backend, capacity, anew(), scan, share.ring, share.lent, anew
        )
        self.caches.append(made)
        return made

    def sources(self, header: TableHeader, share: Share) -> dict[int, Source]:
        """A layer table's records, by layer."""
        cache = self.cached(self.open(header), share)
        pinned = cache.load(share.pinned, self.tick)
        return {k: Source(cache, i, pinned.get(i)) for i, k in enumerate(header.keys)}

    def banks(self, header: TableHeader, share: Share, count: int) -> dict[int, ExpertBank]:
        """The layers of a table of experts. If all have slots, all are read now."""
        table, capacity = self.open(header), max(1, share.ring)
        hints = Hints(per_layer=count, layers=len(table) // count, ranked=self.experts.ranked)
        anew = partial(self.experts.policy, capacity, hints)
        cache = Cached(
            table, self.reader, self.backend, capacity, anew(),
            depth=0 if capacity == len(table) else None, anew=anew,
        )  # fmt: skip
        self.caches.append(cache)
        if capacity == len(table):
            cache.load(range(len(table)), self.tick)
        kind, handling = activation_type(header.tensors["gate_up"]), self.experts.handling(count)
        layers = header.keys[::count]
        return {k // count: ExpertBank(cache, kind, capacity, k // count, i, count, handling)
                for i, k in enumerate(layers)}  # fmt: skip

    def copies(self, pack: Pack) -> dict[int, Copies]:
        """By layer: another pack's experts, which pass through a few slots."""
        out: dict[int, Copies] = {}
        mixture = pack.description.mixture
        assert mixture is not None
        for header in (t for t in pack.tables if t.kind == "experts"):
            table = Table(pack.path, header, self.traffic, self.verify)
            self.tables.append(table)
            slots = least_slots(header, mixture.used)
            anew = partial(make, "lru", slots, Hints())
            cache = Cached(table, self.reader, self.backend, slots, anew(), anew=anew)
            self.caches.append(cache)
            for at in range(0, len(header.keys), mixture.count):
                out[header.keys[at] // mixture.count] = Copies(cache, at)
        return out

    def rows(self, header: TableHeader, share: Share) -> RowTable:
        """A row table: its pinned records are its first ones."""
        table, count = self.open(header), len(share.pinned)
        joined = join(table, self.reader, self.backend, count, self.tick)
        cache = None
        if share.ring:
            rest = range(count, len(table))
            anew = partial(PinAndRing, share.ring, ())
            cache = Cached(table, self.reader, self.backend, share.ring, anew(), rest, anew=anew)
            self.caches.append(cache)
        return RowTable(table, self.reader, self.backend, joined, cache)


def _at_once(header: TableHeader, share: Share) -> int:
    """Records that are read when a model is opened."""
    if header.kind == "experts":
        return len(header.keys) if share.ring == len(header.keys) else 0
    return len(share.pinned)


def load(
    pack: Pack,
    backend: Backend,
    traffic: IOStats,
    progress: Progress,
    shares: Shares | None = None,
    verify: str = "first",
    experts: ExpertOptions | None = None,
    copies: Pack | None = None,
) -> Loaded:
    """Open a pack's tables and read what stays in memory (all of it where `shares` is None). `copies`: the
    same model at fewer bits, for experts that are missing. Raises PackError if a record is damaged,
    ReadError."""
    shares = shares or {}
    whole = {t.name: shares.get(t.name, all_of(t)) for t in pack.tables}
    total = sum(_at_once(t, whole[t.name]) * t.stride for t in pack.tables)
    done = 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        progress("loading", done, total)

    state = _Loading(pack, backend, traffic, verify, tick, experts or ExpertOptions())
    try:
        loaded = _load(state, whole)
        for layer, found in (state.copies(copies) if copies is not None else {}).items():
            loaded.banks[layer].copies = found
        return loaded
    except BaseException:
        state.reader.close()
        for table in state.tables:
            table.close()
        raise


def _load(state: _Loading, shares: Shares) -> Loaded:
    rows: dict[str, RowTable] = {}
    layers: dict[str, dict[int, Source]] = {"attn": {}, "ffn": {}, "final": {}}
    banks: dict[int, ExpertBank] = {}
    mixture = state.pack.description.mixture
    for header in state.pack.tables:
        if header.kind == "rows":
            rows[header.name] = state.rows(header, shares[header.name])
        elif header.kind == "experts" and mixture is not None:
            banks |= state.banks(header, shares[header.name], mixture.count)
        else:
            layers[header.name.split("-")[0]] |= state.sources(header, shares[header.name])
    for cache in state.caches:
        cache.start()
    for i, bank in banks.items():
        bank.following = banks[(i + 1) % len(banks)]
    pairs = (
        (layers["attn"][i], layers["ffn"][i]) for i in range(state.pack.description.num_layers)
    )
    head, final = rows.get("head", rows["embed"]), layers["final"][0].pinned
    assert final is not None
    return Loaded(
        rows["embed"], head, tuple(pairs), final, tuple(banks[i] for i in sorted(banks)),
        state.reader, state.tables, state.caches,
        activation_type(state.pack.table_of("attn-0").tensors["qkv"]), state.traffic,
        state.expert_traffic,
    )  # fmt: skip


def activation_type(matrices: Sequence[Matrix] | Sequence[Weight]) -> torch.dtype:
    """fp32 packs run in fp32, all others in bf16."""
    first = matrices[0]
    name = first.encoding if isinstance(first, Matrix) else first.encoding.name
    return torch.float32 if name == "fp32" else torch.bfloat16
