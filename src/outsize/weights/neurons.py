"""A layer's neurons, bundle by bundle: those that a step needs are fetched through a cache that all
layers share, and put together as matrices (LLM in a flash, arXiv 2312.11514).

Gate and up rows of the fetched bundles lie close together; down's columns lie where the dense matrix has
them, in scratch as large as one layer's, and what is not fetched meets zeros. So a row's product is the
dense kernel's, with zeros for the neurons that it left out: its bits depend neither on the other rows nor
on what the cache holds.

Shapes: F neurons of a layer, N bundles of them, n of which are fetched, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from outsize.caching.policy import Hints, make
from outsize.encoding.find import encoding
from outsize.kernels.gather import Pieces
from outsize.kernels.plain import PLAIN
from outsize.pack.bundle_rows import CODES, SCALE
from outsize.pack.bundles import DOWN, UP, BundleLayout, Region, shared_fields
from outsize.pack.tables import Matrix
from outsize.storage.reader import Reader
from outsize.storage.table import Table, Weight
from outsize.weights.bundles import Bundles, BundleTable
from outsize.weights.open_pack import OpenPack
from outsize.weights.residency import Share
from outsize.weights.routed import RoutedCache

Vectors = Mapping[str, tuple[Weight, ...]]


class Scratch:
    """Room for the matrices of one layer at a time, for all layers of a table."""

    def __init__(self, form: BundleLayout, reader: Reader) -> None:
        self.form, self._reader = form, reader
        self._down = _rows_room(form) if form.down is None else _room(form.down, form.shared)
        self._gate_up = [_room(m, ()) for m in form.gate_up]
        self._fields = [self._placed(region) for region in form.regions]

    def begin(self, count: int) -> None:
        """So many bundles are about to be filled in."""
        self._count = count

    def fill(self, at: int, ids: Sequence[int], found: tuple[Tensor, Tensor]) -> None:
        """Bundles `ids` of a layer, the `at`th on of those that were announced. `found`: records, and
        where in them each is."""
        where = torch.tensor(ids, dtype=torch.int64, device="cpu")
        row = torch.arange(at, at + len(ids), dtype=torch.int64, device="cpu")
        for region, pieces, to in self._fields:
            if region.tensor == DOWN and self.form.down is not None:
                to_n = where if region.each == 1 else where // region.each
            else:  # up's rows are below all of gate's where both are one matrix
                is_below = region.tensor == UP and len(self._gate_up) == 1
                to_n = row + self._count if is_below else row
            self._reader.backend.gather(*found, pieces, to, to_n)

    def _placed(self, region: Region) -> tuple[Region, Pieces, Tensor]:
        """A region, its pieces, and the bytes of the field that they go to."""
        if region.tensor == DOWN:
            field = self._down[region.field]
        else:
            field = self._gate_up[-1 if region.tensor == UP else 0][region.field]
        count = math.prod(region.shape[: region.axis])
        to = field.view(-1).view(torch.uint8).view(count, -1)
        return region, Pieces(region.offset, count, region.size // count), to

    def gate_up(self) -> tuple[Weight, ...]:
        """Of the bundles that were filled in: (2 n bundle, D) in one piece, or gate and up apart; or up's
        (n bundle, D) alone."""
        rows = self._count * self.form.bundle * self.form.halves // len(self._gate_up)
        out = []
        for matrix, fields in zip(self.form.gate_up, self._gate_up, strict=True):
            kind = encoding(matrix.encoding, self._reader.backend)
            specs = kind.specs(rows, matrix.width)
            some = {
                name: fields[name].narrow(spec.row_axis, 0, spec.shape[spec.row_axis]).contiguous()
                for name, spec in specs.items()
            }
            out.append(Weight(kind, some, rows))
        return tuple(out)

    @property
    def by_rows(self) -> bool:
        """Is down kept by rows, a neuron's each?"""
        return self.form.down is None

    def down_rows(self) -> tuple[Tensor, Tensor]:
        """Codes (n bundle, D) and scales of the bundles that were filled in."""
        rows = self._count * self.form.bundle
        return self._down[CODES][:rows], self._down[SCALE][:rows]

    def down(self, shared: Mapping[str, Tensor]) -> tuple[Weight, ...]:
        """(D, F), with numbers of no meaning where nothing was filled in. `shared`: the layer's own
        fields."""
        m = self.form.down
        assert m is not None
        fields = {name: shared.get(name, self._down.get(name)) for name in m.specs}
        whole = {name: field for name, field in fields.items() if field is not None}
        return (Weight(encoding(m.encoding, self._reader.backend), whole, m.num_rows),)


def _rows_room(form: BundleLayout) -> dict[str, Tensor]:
    regions = [r for r in form.regions if r.tensor == DOWN]
    return {
        r.field: torch.zeros((form.neurons, *r.shape[1:]), dtype=r.dtype, device="cpu")
        for r in regions
    }


def _room(matrix: Matrix, but: Sequence[str]) -> dict[str, Tensor]:
    """Zeros are numbers in every encoding, which memory as it comes need not hold."""
    return {
        name: torch.zeros(spec.shape, dtype=spec.dtype, device="cpu")
        for name, spec in matrix.specs.items()
        if name not in but
    }


@dataclass(slots=True)
class NeuronBank:
    """The neurons of one layer. `number`: the layer's place in its table; `vectors`: the norms and biases
    of its feed-forward; `shared`: fields of down."""

    layer: int
    number: int
    cache: RoutedCache
    scratch: Scratch
    vectors: Vectors
    shared: Mapping[str, Tensor]

    @property
    def form(self) -> BundleLayout:
        return self.scratch.form

    def fetch(self, ids: Sequence[int], rows: Sequence[Sequence[int]]) -> Scratch:
        """The matrices of some bundles, in this order; valid until the next call on this table. `rows`: those
        that each token wants, in order. Raises PackError, ReadError."""
        base, policy = self._observe(rows), self.cache.slot_table.policy
        self.scratch.begin(len(ids))
        for at in range(0, len(ids), policy.room):
            wave = ids[at : at + policy.room]
            self.scratch.fill(at, wave, self.cache.locate([base + i for i in wave]))
            self.cache.release()
        policy.finish_ranking()
        return self.scratch

    def fetch_more(
        self, ids: Sequence[int], rows: Sequence[Sequence[int]]
    ) -> tuple[Scratch, list[int]]:
        """The same, and behind them those that are in memory anyway; and which these are."""
        policy, count = self.cache.slot_table.policy, self.form.count
        if len(ids) > policy.room:  # what is there is of this very call
            return self.fetch(ids, rows), []
        base, wanted = self._observe(rows), set(ids)
        found = self.cache.locate([base + i for i in ids]) if ids else None
        there = (i - base for i in self.cache.there(range(base, base + count)))
        more = [i for i in there if i not in wanted]
        self.scratch.begin(len(ids) + len(more))
        if found is not None:
            self.scratch.fill(0, ids, found)
        if more:
            self.scratch.fill(len(ids), more, self.cache.look([base + i for i in more]))
        self.cache.release()
        policy.finish_ranking()
        return self.scratch, more

    def _observe(self, rows: Sequence[Sequence[int]]) -> int:
        """The policy hears what each token wants; the number of the layer's first bundle."""
        base = self.number * self.form.count
        self.cache.slot_table.policy.observe(self.number, [[base + i for i in row] for row in rows])
        return base


def load(pack: OpenPack) -> tuple[NeuronBank, ...]:
    """Every layer's neuron bank, in order. A table whose records all have slots is read now."""
    banks: dict[int, NeuronBank] = {}
    assert pack.plan.neurons is not None
    bundles, eviction = pack.plan.neurons
    for found in bundles.tables:
        table = Table(bundles.path, found.bundles, pack.expert_stats, pack.plan.verify)
        pack.tables.append(table)
        slots = pack.plan.shares.get(found.bundles.name, Share((), len(table))).ring
        hints = Hints(per_layer=found.form.count, layers=len(found.layers))
        cache = RoutedCache(
            table, pack.reader, partial(make, eviction, slots, hints), slots, scatters=True
        )
        pack.caches.append(cache)
        if slots == len(table):
            cache.load(range(len(table)), pack.on_read)
        scratch = Scratch(found.form, pack.reader)
        for number, (layer, raw) in enumerate(
            zip(found.layers, _shared(pack, bundles, found), strict=True)
        ):
            vectors, shared = _fields(found, raw)
            banks[layer] = NeuronBank(layer, number, cache, scratch, vectors, shared)
    return tuple(banks[layer] for layer in sorted(banks))


def _shared(pack: OpenPack, bundles: Bundles, found: BundleTable) -> list[Tensor]:
    """Each layer's record of what its bundles share, read now."""
    table = Table(bundles.path, found.shared, pack.stats, pack.plan.verify)
    try:
        out = []
        for index in range(len(table)):
            raw = torch.empty(table.header.stride, dtype=torch.uint8, device="cpu")
            table.read(index, memoryview(raw.numpy()))  # type: ignore[arg-type]
            out.append(raw)
        return out
    finally:
        table.close()


def _fields(found: BundleTable, raw: Tensor) -> tuple[Vectors, dict[str, Tensor]]:
    fields, _ = shared_fields(found.dense, found.form)
    shared = {f.field: f.of(raw) for f in fields if f.tensor == DOWN}
    vectors: dict[str, tuple[Weight, ...]] = {}
    for f in fields:
        if f.tensor != DOWN:
            piece = Weight(encoding("fp32", PLAIN), {f.field: f.of(raw)}, 1)
            vectors[f.tensor] = (*vectors.get(f.tensor, ()), piece)
    return vectors, shared
