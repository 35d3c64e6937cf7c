"""The table kind "rows", an embedding or a head (the output matrix): its leading rows resident, the others on
disk. Rows are read by id, and blocks of rows in order, for a product with all of them.

Shapes: T ids, K numbers a row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from outsize.encoding.find import encoding
from outsize.encoding.plain import Fields, Plain, slice_rows
from outsize.kernels.plain import PLAIN
from outsize.pack.tables import PAGE, Matrix, aligned, field_bytes
from outsize.storage.buffers import BufferPool, buffer, whole
from outsize.storage.reader import Reader
from outsize.storage.table import Table, Weight, view
from outsize.weights.open_pack import OpenPack
from outsize.weights.residency import OnRead, Share
from outsize.weights.scan import ScanCache

FEW = 8  # rows of one record: up to here they are read one by one
IN_FLIGHT = 4
RING = 2  # slots of a head with no resident rows: one in use, the next being read


class RowTable:
    """A matrix by rows. `joined`: its first records as one matrix in memory. `cache`: the others, in a scan;
    None: they are read by id only."""

    def __init__(
        self, table: Table, reader: Reader, joined: Weight | None, cache: ScanCache | None
    ) -> None:
        self.table, self._reader = table, reader
        (self._matrix,) = next(iter(table.header.tensors.values()))
        self.encoding = encoding(self._matrix.encoding, reader.backend)
        self._joined, self.cache = joined, cache
        self._num_joined = 0 if joined is None else joined.num_rows
        # A float matmul's bits depend on how many rows it has, so floats are always taken by blocks.
        self._by_blocks = isinstance(self.encoding, Plain)

    @property
    def is_resident(self) -> bool:
        """Are all rows in memory?"""
        return self._num_joined >= self.table.header.num_rows

    @property
    def resident_bytes(self) -> int:
        """Bytes of what is joined in memory."""
        return 0 if self._joined is None else sum(f.nbytes for f in self._joined.fields.values())

    @property
    def ring_bytes(self) -> int:
        """Bytes of slots that `drop` must take for blocks to pass through."""
        if self.cache is not None:
            return 0
        return min(RING, len(self.table)) * self.table.header.stride

    def drop(self, is_head: bool) -> int:
        """Read all rows from disk from now on; a head's in blocks. The bytes this frees."""
        freed = self.resident_bytes - (self.ring_bytes if is_head else 0)
        if freed <= 0:
            return 0
        everything = range(len(self.table))
        if self.cache is not None:
            self.cache.set_scan(everything)
        elif is_head:
            ring = Share((), min(RING, len(self.table)))
            self.cache = ScanCache(self.table, self._reader, ring, everything)
        self._joined, self._num_joined = None, 0  # last: broken off before, all is as it was
        return freed

    def blocks(self) -> Iterator[Weight]:
        """All rows, in order; each block is valid until the next is asked for."""
        size, stats = self._matrix.num_rows, self.table.stats
        first = -(-self._num_joined // size)
        stats.hits += first
        if self._joined is not None:
            yield from self._split(self._joined, size) if self._by_blocks else [self._joined]
        for i in range(first, len(self.table)):
            assert self.cache is not None
            (weights,) = self.cache.fetch([i])
            yield next(iter(weights.values()))[0]
            self.cache.release()

    def _split(self, joined: Weight, size: int) -> Iterator[Weight]:
        for start in range(0, self._num_joined, size):
            some = slice_rows(self._matrix.specs, joined.fields, start, start + size)
            yield Weight(self.encoding, some, size)

    def rows(self, ids_T: Tensor) -> Tensor:
        """(T, K) fp32."""
        if self._joined is not None and (self.is_resident or int(ids_T.max()) < self._num_joined):
            return self.encoding.rows(self._joined.fields, ids_T)
        out_TK = torch.empty(len(ids_T), self._matrix.width, dtype=torch.float32, device="cpu")
        resident_T = ids_T < self._num_joined
        if self._joined is not None and bool(resident_T.any()):
            out_TK[resident_T] = self.encoding.rows(self._joined.fields, ids_T[resident_T])
        started = time.perf_counter()
        by_record: dict[int, list[int]] = {}
        for at in (~resident_T).nonzero()[:, 0].tolist():
            by_record.setdefault(int(ids_T[at]) // self._matrix.num_rows, []).append(at)
        few = [r for r, places in by_record.items() if self._are_few(r, places)]
        for record in few:
            places = by_record.pop(record)
            out_TK[places] = self._few(record, self._local(record, ids_T[places]))
        for record, raw in read_in_turn(self.table, self._reader, list(by_record)):
            self.table.stats.bytes_demanded += self.table.header.stride
            places = by_record[record]
            fields = view(raw, self._matrix, PLAIN).fields
            out_TK[places] = self.encoding.rows(fields, self._local(record, ids_T[places]))
        self.table.stats.waited_s += time.perf_counter() - started
        return out_TK

    def _local(self, record: int, ids_T: Tensor) -> Tensor:
        return ids_T - record * self._matrix.num_rows

    def _are_few(self, record: int, places: Sequence[int]) -> bool:
        return len(places) <= FEW and by_row(self._matrix) and self.table.is_verified(record)

    def _few(self, record: int, local_T: Tensor) -> Tensor:
        """Only the pages that these rows lie in; neighbours in one read."""
        ranges = _merged([r for i in local_T.tolist() for r in _pages(self._matrix, i)])
        raw, out = buffer(sum(stop - start for start, stop in ranges))
        tickets, at, places = [], 0, {}
        for start, stop in ranges:
            piece = out[at : at + stop - start]
            tickets.append(self._reader.submit(self.table, record, piece, start))
            places[start, stop] = at
            at += stop - start
        for ticket in tickets:
            ticket.wait()
        self.table.stats.bytes_demanded += at
        fields = _gather(self._matrix, raw, places, local_T.tolist())
        return self.encoding.rows(
            fields, torch.arange(len(local_T), dtype=torch.int64, device="cpu")
        )


def by_row(matrix: Matrix) -> bool:
    """Is every field of a row one run of bytes?"""
    return all(s.row_axis == 0 and s.shape[0] == matrix.num_rows for s in matrix.specs.values())


def _spans(matrix: Matrix, row: int) -> list[tuple[int, int]]:
    """(first byte, bytes) of each of a row's fields in its record."""
    sizes = [field_bytes(s) // matrix.num_rows for s in matrix.specs.values()]
    return [(o + row * n, n) for o, n in zip(matrix.offsets().values(), sizes, strict=True)]


def _pages(matrix: Matrix, row: int) -> list[tuple[int, int]]:
    return [
        (start // PAGE * PAGE, aligned(start + size, PAGE)) for start, size in _spans(matrix, row)
    ]


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(stop, out[-1][1])
        else:
            out.append((start, stop))
    return out


def _gather(
    matrix: Matrix, raw: Tensor, places: dict[tuple[int, int], int], rows: Sequence[int]
) -> dict[str, Tensor]:
    """The rows' fields out of the pages that were read."""
    found: dict[str, list[Tensor]] = {name: [] for name in matrix.specs}
    for row in rows:
        for name, (start, size) in zip(matrix.specs, _spans(matrix, row), strict=True):
            (first, at) = next((a, p) for (a, b), p in places.items() if a <= start < b)
            found[name].append(raw[at + start - first : at + start - first + size])
    return {
        name: torch.stack(found[name]).view(spec.dtype).view(len(rows), *spec.shape[1:])
        for name, spec in matrix.specs.items()
    }


def load(pack: OpenPack) -> dict[str, RowTable]:
    """The tables of kind "rows", by name. Their pinned records are their first ones."""
    out = {}
    for table, share in pack.open("rows", pack.stats):
        count = len(share.pinned)
        joined, cache = join(table, pack.reader, count, pack.on_read), None
        if share.ring:
            rest = range(count, len(table))
            cache = ScanCache(table, pack.reader, Share((), share.ring), rest)
        out[table.header.name] = RowTable(table, pack.reader, joined, cache)
    return out


def join(table: Table, reader: Reader, count: int, on_read: OnRead) -> Weight | None:
    """The first `count` records as one matrix, joined as they are read."""
    if count == 0:
        return None
    header = table.header
    (matrix,) = next(iter(header.tensors.values()))
    joined = Matrix(matrix.encoding, matrix.num_rows * count, matrix.width, 0)
    fields = view(whole(joined.size), joined, PLAIN).fields
    for i, raw in read_in_turn(table, reader, range(count)):
        _copy(fields, view(raw, matrix, PLAIN), matrix, i)
        on_read(header.stride)
    num_rows = min(matrix.num_rows * count, header.num_rows)
    return Weight(encoding(matrix.encoding, reader.backend), fields, num_rows)


def read_in_turn(
    table: Table, reader: Reader, records: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Whole records, a few in flight; each is valid until the next."""
    pool = BufferPool(IN_FLIGHT, table.header.stride)
    buffers = [pool[i] for i in range(min(IN_FLIGHT, len(records)))]
    tickets = [reader.submit(table, r, out) for r, (_, out) in zip(records, buffers, strict=False)]
    for i, record in enumerate(records):
        slot = i % len(buffers)
        tickets[slot].wait()
        yield record, buffers[slot][0]
        if i + len(buffers) < len(records):
            tickets[slot] = reader.submit(table, records[i + len(buffers)], buffers[slot][1])


def _copy(fields: Fields, block: Weight, matrix: Matrix, index: int) -> None:
    count = block.encoding.stored_rows(block.fields)
    some_rows = slice_rows(matrix.specs, fields, index * count, (index + 1) * count)
    for name, some in some_rows.items():
        some.copy_(block.fields[name])
