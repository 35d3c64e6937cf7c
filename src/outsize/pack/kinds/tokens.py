"""Tokens: a row for each token, of all layers together, so that what all layers need of a token is one read
that is known before the first layer runs. A record is one row, or as many as fill a page.

Of a table of feed-forwards, the rows are in the order of their use; the row of each token is in the record
of the final norm, and so is what makes the model's width of a row's numbers. `outsize adapt memory --tables`
makes such a table. Per-layer embeddings (Gemma 4) are a checkpoint's, in the order of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

from outsize.checkpoint.checkpoint import Tensor, rows_of
from outsize.errors import UnsupportedError
from outsize.model_config import Description
from outsize.pack.kinds.kind import Group, Kind
from outsize.pack.records import Layout, lay_out
from outsize.pack.tables import PAGE, Matrix, TableHeader
from outsize.pack.tensors import Part, Piece, Record, SourceTensors, TablePlan

NAME, PER_LAYER = "memory", "perlayer"
SOURCE = "token_rows"  # a family's name of per-layer embeddings
ENCODINGS = {16: "bf16", 8: "group8", 4: "group4"}  # by bits of a number
FLOATS = "fp32"  # of per-layer embeddings, too
LEAST = 64  # records that a step's rows are read into
MOST = (
    4096  # of per-layer embeddings that are held: of a token each is one read, and a text has few
)
UNIT = 64  # numbers, of which rows in 8 and 4 bits have a multiple


class TokenRows(Sequence[Record]):
    """The records of a checkpoint's tensor (V, layers * W), of `each` tokens each; made when asked for, since
    there may be hundreds of thousands."""

    def __init__(self, tensor: Tensor, width: int, each: int, encoding: str) -> None:
        self._tensor, self._width, self._each, self._encoding = tensor, width, each, encoding

    def __len__(self) -> int:
        return -(-self._tensor.shape[0] // self._each)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        some = rows_of(self._tensor, index * self._each, (index + 1) * self._each)
        shape = some.shape[0] * some.shape[1] // self._width, self._width
        return {"rows": (Piece(self._encoding, (Part(replace(some, shape=shape)),)),)}


class Tokens(Kind):
    """`num_rows` of a table's header are the vocabulary's; its keys are each record's first row."""

    routed = True

    def groups(self, d: Description) -> Sequence[Group]:
        if d.token_width:
            return (Group(PER_LAYER, 6, {}),)
        return (Group(NAME, 6, {}),) if d.has_table else ()

    def plan(self, group: Group, tensors: SourceTensors) -> list[TablePlan]:
        d = tensors.description
        if group.name == PER_LAYER:
            tensor = tensors.find(SOURCE, 0, (d.vocab_size, d.num_layers * d.token_width))
            encoding = _encoding(tensors, tensor)
            made = header(d, encoding)
            return [TablePlan(made, TokenRows(tensor, d.token_width, rows_each(made), encoding))]
        raise UnsupportedError(
            "no checkpoint has a table of feed-forwards; pack its model, and make one of that with "
            "`outsize adapt memory --tables`"
        )

    def fault(self, d: Description, group: Group, tables: Sequence[TableHeader]) -> str:
        """All of a header follows from the model and the encoding."""
        if [t.name for t in tables] != [f"{group.name}-0"]:
            return f"there is no table {group.name}-0"
        (table,) = tables
        known = [*ENCODINGS.values(), *([FLOATS] if group.name == PER_LAYER else [])]
        found = next((m.encoding for ms in table.tensors.values() for m in ms), "")
        if found not in known:
            return f"table {table.name} is in {found[:80]!r}; {', '.join(known)} are known"
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

    def most_slots(self, d: Description, table: TableHeader) -> int:
        return min(len(table.keys), MOST) if d.token_width else len(table.keys)


def _encoding(tensors: SourceTensors, tensor: Tensor) -> str:
    """Of per-layer embeddings: floats as bf16, codes of 4 and 8 bits as they are, others in 8 bits. Raises
    UnsupportedError for rows that cannot be told apart."""
    width, kind = tensors.description.token_width, tensor.kind
    if width % kind.length:
        raise UnsupportedError(
            f"tensor {tensor.name!r} is {kind.name}, in blocks of {kind.length} numbers, and a token has "
            f"{width} in each layer; use a GGUF of another type"
        )
    if tensors.wanted in (FLOATS, "bf16"):
        return tensors.wanted
    is_coded = kind.code is not None or tensors.wanted != "auto"
    if not is_coded or width % UNIT:
        return ENCODINGS[16]
    return ENCODINGS[4 if kind.name == "Q4_0" else 8]


def widths(d: Description) -> tuple[int, ...]:
    """Numbers of a token, by matrix of a record: of all layers alike in one, else a matrix a layer."""
    if d.token_width:
        return (d.token_width,) * d.num_layers
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
    name = PER_LAYER if d.token_width else NAME
    return TableHeader(f"{name}-0", "tokens", firsts, stride, laid, (), d.vocab_size)


def rows_each(table: TableHeader) -> int:
    """Tokens' rows of a record."""
    return table.keys[1] if len(table.keys) > 1 else table.num_rows


KIND = Tokens()
