"""Rows: an embedding or a head (the output matrix). A record is a block of consecutive rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from outsize.checkpoint.checkpoint import rows_of
from outsize.kernels.palettes import FORMS
from outsize.model_config import Description
from outsize.pack.kinds.kind import Group, Kind
from outsize.pack.records import lay_out, matrix, record_fault
from outsize.pack.tables import Matrix, TableHeader, aligned
from outsize.pack.tensors import Part, Piece, Record, SourceTensors, TablePlan

ROW_RECORD = 2 << 20  # bytes of a record, about
HEAD_BITS = 6  # where few bits are wanted: a head in less costs more than it saves
BLOCK = 64  # a record has a multiple of so many rows


class Rows(Kind):
    """`num_rows` of a table's header are those of the whole matrix; its keys are each block's first row."""

    from_front = True

    def groups(self, d: Description) -> Sequence[Group]:
        if d.further:
            return []
        names = ("embed",) if d.tied else ("embed", "head")
        return [
            Group(name, place, {name: matrix(d.width, (name, d.vocab_size))})
            for place, name in enumerate(names)
        ]

    def plan(self, group: Group, tensors: SourceTensors) -> list[TablePlan]:
        name, d, wanted = group.name, tensors.description, tensors.wanted
        tensor = tensors.find(name, 0, (d.vocab_size, d.width))
        if (wanted in FORMS and FORMS[wanted].bits < HEAD_BITS) or wanted == "int4":
            wanted = "q8_0" if tensors.grouped and d.width % 32 == 0 else "int8"
        encoding = tensors.encoding(tensor, wanted)
        block = _rows_per_record(encoding, d)
        starts = range(0, d.vocab_size, block)
        records: list[Record] = [
            {name: (Piece(encoding, (Part(rows_of(tensor, s, s + block)),)),)} for s in starts
        ]
        layout, stride = lay_out({name: (Matrix(encoding, block, d.width, 0),)})
        header = TableHeader(name, "rows", tuple(starts), stride, layout, (), d.vocab_size)
        return [TablePlan(header, tuple(records))]

    def fault(self, d: Description, group: Group, tables: Sequence[TableHeader]) -> str:
        """Blocks of rows, in order and as many as the vocabulary needs."""
        name = group.name
        if [t.name for t in tables] != [name]:
            return f"there is no table {name}"
        (table,) = tables
        found = table.tensors.get(name, ())
        if table.kind != "rows" or list(table.tensors) != [name] or len(found) != 1:
            return f"table {name} does not hold one matrix of rows"
        block, size = found[0].num_rows, d.vocab_size
        if not 0 < block <= aligned(size, BLOCK) or block % BLOCK or table.num_rows != size:
            return (
                f"table {name} holds {table.num_rows:,} rows in blocks of {block:,}, blocks of a multiple of "
                f"{BLOCK} and {size:,} in all are due"
            )
        if table.keys != tuple(range(0, size, block)):
            return f"the blocks of table {name} are not the model's {size:,} rows in order"
        problem = record_fault(table, {name: matrix(d.width, (name, block))})
        return f"table {name}: {problem}" if problem else ""

    def order(
        self, d: Description, tables: Sequence[TableHeader]
    ) -> Iterator[tuple[int, str, int]]:
        """The head before all layers; an embedding of its own last, and after experts, which take what
        there is."""
        head = "embed" if d.tied else "head"
        for table in tables:
            if table.name == head or d.mixture is None:
                rank = 0 if table.name == head else 2
                yield from ((rank, table.name, i) for i in range(len(table.keys)))


def _rows_per_record(encoding: str, d: Description) -> int:
    size = Matrix(encoding, BLOCK, d.width, 0).size
    return min(max(1, ROW_RECORD // size) * BLOCK, aligned(d.vocab_size, BLOCK))


KIND = Rows()
