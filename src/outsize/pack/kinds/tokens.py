"""Tokens: a row for each token, of all layers together, so that what all layers need of a token is one read
that is known before the first layer runs. A record is one row, or as many as fill a page.

The rows are in the order of their use; the row of each token is in the record of the final norm, and so is
what makes the model's width of a row's numbers. `outsize adapt memory --tables` makes such a table.
"""

from __future__ import annotations

from collections.abc import Sequence

from outsize.errors import UnsupportedError
from outsize.model_config import Description
from outsize.pack.kinds.kind import Group, Kind
from outsize.pack.records import Layout, lay_out
from outsize.pack.tables import PAGE, Matrix, TableHeader
from outsize.pack.tensors import SourceTensors, TablePlan

NAME = "memory"
ENCODINGS = {16: "bf16", 8: "group8", 4: "group4"}  # by bits of a number
LEAST = 64  # records that a step's rows are read into


class Tokens(Kind):
    """`num_rows` of a table's header are the vocabulary's; its keys are each record's first row."""

    routed = True

    def groups(self, d: Description) -> Sequence[Group]:
        return (Group(NAME, 6, {}),) if d.has_table else ()

    def plan(self, group: Group, tensors: SourceTensors) -> list[TablePlan]:
        raise UnsupportedError(
            "no checkpoint has a table of feed-forwards; pack its model, and make one of that with "
            "`outsize adapt memory --tables`"
        )

    def fault(self, d: Description, group: Group, tables: Sequence[TableHeader]) -> str:
        """All of a header follows from the model and the encoding."""
        if [t.name for t in tables] != [f"{NAME}-0"]:
            return f"there is no table {NAME}-0"
        (table,) = tables
        found = next((m.encoding for ms in table.tensors.values() for m in ms), "")
        if found not in ENCODINGS.values():
            return f"table {table.name} is in {found[:80]!r}; {', '.join(ENCODINGS.values())} are known"
        try:
            due = header(d, found)
        except UnsupportedError as e:
            return str(e)
        ours, theirs = (
            (t.kind, t.keys, t.stride, dict(t.tensors), t.num_rows) for t in (due, table)
        )
        return (
            ""
            if ours == theirs
            else f"table {table.name} is not laid out for {d.vocab_size:,} rows"
        )

    def least_slots(self, d: Description, table: TableHeader) -> int:
        return min(len(table.keys), LEAST)


def widths(d: Description) -> tuple[int, ...]:
    """Numbers of a token, by matrix of a record: of all layers alike in one, else a matrix a layer."""
    assert d.memory is not None
    return d.memory.widths(d)


def layout(widths: Sequence[int], encoding: str) -> tuple[Layout, int, int]:
    """The matrices of a record, its bytes, and how many tokens' rows it has. Alike widths make one matrix, of
    a row for each token and layer. Raises UnsupportedError."""
    rows = 1
    while _size(_matrices(widths, encoding, rows + 1)) <= PAGE:
        rows += 1
    return *lay_out(_matrices(widths, encoding, rows)), rows


def _matrices(widths: Sequence[int], encoding: str, rows: int) -> Layout:
    if len(set(widths)) == 1:
        return {"rows": (Matrix(encoding, rows * len(widths), widths[0], 0),)}
    return {"rows": tuple(Matrix(encoding, rows, w, 0) for w in widths)}


def _size(laid: Layout) -> int:
    return sum(m.size for ms in laid.values() for m in ms)


def header(d: Description, encoding: str) -> TableHeader:
    """Of a model's table, without checksums. Raises UnsupportedError for widths that the encoding has not."""
    laid, stride, rows = layout(widths(d), encoding)
    firsts = tuple(range(0, d.vocab_size, rows))
    return TableHeader(f"{NAME}-0", "tokens", firsts, stride, laid, (), d.vocab_size)


def rows_each(table: TableHeader) -> int:
    """Tokens' rows of a record."""
    return table.keys[1] if len(table.keys) > 1 else table.num_rows


KIND = Tokens()
