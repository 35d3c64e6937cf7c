"""The table kind "tokens": a row for each token, of all layers together, from disk through a cache that
begins with the rows that are used most and keeps those that were used last.

Which rows a step needs is known with its tokens, before any layer: `ask` starts reading, and what it returns
waits where a layer first needs them. A long step's rows are read once each, in the file's order, and kept as
they are stored until the step is over.
Shapes: T tokens of a step, S slots, W numbers of a layer in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from outsize.caching.policy import Hints, make
from outsize.encoding.find import encoding
from outsize.pack.format import damaged
from outsize.pack.kinds.layers import ORDER
from outsize.pack.kinds.tokens import rows_each
from outsize.pack.tables import Matrix, field_bytes
from outsize.storage.records import Records
from outsize.storage.tickets import Ticket
from outsize.weights.open_pack import OpenPack
from outsize.weights.routed import RoutedCache

AT_ONCE = 4 << 20  # numbers of a step's rows that are decoded together; more: layer by layer
POLICY = "lru"
IN_FLIGHT = 256  # records, when a table is opened


class Place(NamedTuple):
    """Where rows are: of each token its record's place among some bytes, and its row in the record."""

    raw: Tensor  # (S, stride) bytes
    record_T: Tensor
    row_T: Tensor


class TokenCache(RoutedCache):
    """Records as bytes: no views of slots, of which there may be very many."""

    def ask(self, ids: Sequence[int]) -> Callable[[], tuple[Tensor, Tensor]]:
        """Start reading these, which fit all at once. What is returned waits, and gives bytes (S, stride) and
        in which of them each is. Raises CapacityError; and, waiting, PackError, ReadError."""
        slots = self._demand(ids)

        def wait() -> tuple[Tensor, Tensor]:
            for slot in slots.values():
                self._wait(slot)
            first, pool = self._pool(next(iter(slots.values())))
            places = torch.tensor([slots[i] - first for i in ids], dtype=torch.int64, device="cpu")
            return pool.rows(), places

        return wait

    def _submit(self, index: int, slot: int, urgent: bool) -> Ticket:
        _, out = self._buffer(slot)
        return self._reader.submit(self.table, index, out, urgent=urgent)


class Recalled:
    """The rows of some tokens, on their way or there."""

    def __init__(self, table: TokenTable, found: Callable[[], Place], count: int) -> None:
        self._table, self._found, self._count = table, found, count
        self._place: Place | None = None
        self._all: Tensor | None = None  # (T, layers, W)

    def numbers(self, layer: int) -> Tensor:
        """(T, W) fp32: a layer's part of each token's row. Raises PackError, ReadError."""
        if self._place is None:
            self._place = self._found()
        if not self._table.is_even or self._table.numbers * self._count > AT_ONCE:
            return self._table.decode(self._place, layer)
        if self._all is None:
            self._all = self._table.decode_all(self._place)
        return self._all[:, layer]


class TokenTable:
    """A table with a row for each token, of all layers together."""

    def __init__(self, cache: TokenCache, order_V: Tensor) -> None:
        """`order_V`: the row of each token."""
        self.cache, self._order_V = cache, order_V
        self._matrices = cache.table.header.tensors["rows"]
        self._each = rows_each(cache.table.header)
        self.is_even = len(self._matrices) == 1  # all layers' numbers in one matrix
        self._num_layers = self._matrices[0].num_rows // self._each if self.is_even else 0
        self.numbers = sum(m.num_rows * m.width for m in self._matrices) // self._each

    def ask(self, tokens: Sequence[int]) -> Recall:
        """Start reading the rows of a step's tokens. Raises PackError, ReadError."""
        row_T = self._order_V[torch.tensor(tokens, dtype=torch.int64, device="cpu")]
        record_T = row_T // self._each
        records, at_T = torch.unique(record_T, return_inverse=True)  # sorted
        ids, is_whole = records.tolist(), self.cache.slots == len(self.cache.table)
        inner_T = row_T - record_T * self._each
        if len(ids) > self.cache.slot_table.policy.room:
            raw = self._in_waves(ids)
            return Recall(self, lambda: Place(raw, at_T, inner_T))
        wait = self.cache.ask(ids)

        def found() -> Place:
            raw, places = wait()
            self.cache.release()
            if is_whole:  # nothing is evicted
                return Place(raw, places[at_T], inner_T)
            return Place(raw.index_select(0, places), at_T, inner_T)

        return Recall(self, found)

    def _in_waves(self, ids: Sequence[int]) -> Tensor:
        """(N, stride) bytes: more records than there are slots, each read once."""
        room = self.cache.slot_table.policy.room
        size = len(ids), self.cache.table.header.stride
        out = torch.empty(size, dtype=torch.uint8, device="cpu")
        for at in range(0, len(ids), room):
            raw, places = self.cache.ask(ids[at : at + room])()
            torch.index_select(raw, 0, places, out=out[at : at + len(places)])
            self.cache.release()
        return out

    def decode(self, place: Place, layer: int) -> Tensor:
        """(T, W) fp32 of one layer."""
        if not self.is_even:
            return _decode(self._matrices[layer], place, place.row_T)
        rows_T = place.row_T * self._num_layers + layer
        return _decode(self._matrices[0], place, rows_T)

    def decode_all(self, place: Place) -> Tensor:
        """(T, layers, W) fp32."""
        layers = torch.arange(self._num_layers, dtype=torch.int64, device="cpu")
        rows_TL = place.row_T[:, None] * self._num_layers + layers
        place = place._replace(record_T=place.record_T[:, None].expand_as(rows_TL))
        found = _decode(self._matrices[0], place, rows_TL)
        return found.view(*rows_TL.shape, -1)


class Recall:
    """The rows of a pass's tokens, of which each of its steps has a part."""

    def __init__(self, table: TokenTable, found: Callable[[], Place]) -> None:
        self._table, self._found = table, found
        self._place: Place | None = None

    def part(self, rows: slice) -> Recalled:
        """Those of some of the tokens."""
        return Recalled(self._table, partial(self._some, rows), rows.stop - rows.start)

    def _some(self, rows: slice) -> Place:
        if self._place is None:
            self._place = self._found()
        raw, record_T, row_T = self._place
        return Place(raw, record_T[rows], row_T[rows])


def _decode(matrix: Matrix, place: Place, rows: Tensor) -> Tensor:
    """(N, W) fp32: row `rows` of the matrix in the record of each, in order."""
    fields = {}
    pairs = zip(matrix.specs.items(), matrix.offsets().values(), strict=True)
    for (name, spec), offset in pairs:
        each = field_bytes(spec) // matrix.num_rows
        all_of = place.raw[:, offset : offset + each * matrix.num_rows]
        some = all_of.unflatten(1, (matrix.num_rows, each))[place.record_T, rows]
        fields[name] = some.view(spec.dtype).view(-1, *spec.shape[1:])
    return encoding(matrix.encoding).decode(fields)


def load(pack: OpenPack) -> TokenTable:
    """The model's table, with as many of the rows that are used most as there are slots. Raises
    PackError."""
    ((table, share),) = pack.open("tokens", pack.expert_stats)
    slots = max(1, share.ring)
    cache = TokenCache(table, pack.reader, partial(make, POLICY, slots, Hints()), slots)
    pack.caches.append(cache)
    first = range(min(slots, len(table)))[
        ::-1
    ]  # the least used first, so that it is the first to go
    for at in range(0, len(first), IN_FLIGHT):
        cache.load(first[at : at + IN_FLIGHT], pack.on_read)
    return TokenTable(cache, order(pack))


def order(pack: OpenPack) -> Tensor:
    """(V,): the row of each token. Raises PackError."""
    d = pack.pack.description
    if d.token_width:
        return torch.arange(d.vocab_size, dtype=torch.int64, device="cpu")
    with Records(pack.pack) as records:
        (stored,) = records.read(pack.pack.table_of("final-0"), 0)[ORDER]
        found = stored.encoding.decode(stored.fields)[0].long()
    size = pack.pack.description.vocab_size
    if not torch.equal(found.sort().values, torch.arange(size, dtype=torch.int64, device="cpu")):
        raise damaged(
            pack.pack.path, f"its table's rows are not those of {size:,} tokens, each once"
        )
    return found
