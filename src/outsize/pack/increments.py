"""Nested experts: a dense pack's feed-forwards as consecutive pieces of their neurons, in an order of
importance, each piece a record as an expert's is. A narrow expert is the first few pieces (MatFormer, arXiv
2310.07707; DynaMoE, arXiv 2502.12325).

Rows of gate and up keep their codes in any order. Columns of down keep theirs where no group of them is cut;
otherwise they are re-encoded, in more bits than they have.

Shapes: F neurons of a layer, D width, N pieces of F / N neurons.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from outsize.encoding.find import encoding
from outsize.encoding.palette import Palette
from outsize.encoding.plain import Fields
from outsize.errors import UnsupportedError
from outsize.kernels.palettes import TILE, unpack_codes
from outsize.model_config import Description, Mixture
from outsize.pack.derive import Stored, kept, record_of
from outsize.pack.format import Pack
from outsize.pack.kinds.kind import groups
from outsize.pack.kinds.layers import tables_of
from outsize.pack.tables import Matrix, TableHeader
from outsize.pack.tensors import Made, Record, TablePlan

BLOCK = 32  # neurons that a piece has a multiple of, and that stay together in an order by blocks
ANY = ("fp32", "bf16")  # encodings that cut rows and columns anywhere
NORMS = ("ffn_norm", "ffn_post_norm")


Matrices = tuple[Tensor, Tensor]  # gate over up (2F, D), and down (D, F)


@dataclass(frozen=True, slots=True)
class Pieces:
    """How a dense pack is to be cut. `order_LF`: of each layer's neurons, the most important first."""

    base: Pack
    count: int  # pieces of a layer
    order_LF: Tensor
    learned: Sequence[Matrices] | None = None  # by layer, in this order, in place of the pack's own

    @property
    def description(self) -> Description:
        """Of the pack that is made."""
        d = self.base.description
        mixture = Mixture(self.count, self.count, d.ffn_width // self.count, False, nested=True)
        return replace(d, mixture=mixture)

    @property
    def digest(self) -> str:
        """What names the order."""
        raw = self.order_LF.to(torch.int64).contiguous().numpy().tobytes()
        return hashlib.sha256(raw).hexdigest()[:12]

    def tables(self, stored: Stored) -> list[TablePlan]:
        """Of the pack that is made. Raises UnsupportedError."""
        out: list[TablePlan] = []
        for _, group in groups(self.description):
            if group.name not in ("ffn", "experts"):
                own = [t for t in self.base.tables if t.name.split("-")[0] == group.name]
                out += [kept(table, stored) for table in own]
                continue
            norms: dict[int, Record] = {}
            experts: dict[int, list[Record]] = {}
            for table in dense_tables(self.base):
                for number, layer in enumerate(table.keys):
                    whole = record_of(table, number, stored)
                    norms[layer] = {n: whole[n] for n in NORMS if n in whole}
                    experts[layer] = self._records(table, number, stored)
            ordered = sorted(norms)
            if group.name == "ffn":
                out += tables_of("ffn", "layers", [norms[i] for i in ordered])
            else:
                records = [r for i in ordered for r in experts[i]]
                out += tables_of("experts", "experts", records, self.count)
        return out

    def _records(self, table: TableHeader, number: int, stored: Stored) -> list[Record]:
        """A layer's pieces, in order; their numbers are made when they are written."""
        pieces, down = table.tensors["gate_up"], self._down(table)
        width, kind = (
            self.base.description.ffn_width // self.count,
            _rows_encoding(table.name, pieces),
        )
        layer: _Layer | _Learned = _Layer(table, number, stored, self)
        if self.learned is not None:
            kind = down
            layer = _Learned(self.learned[table.keys[number]], kind, width)
        rows = Matrix(kind, 2 * width, pieces[0].width, 0)
        columns = Matrix(down, table.tensors["down"][0].num_rows, width, 0)
        return [
            {
                "gate_up": (Made(rows.encoding, 2 * width, rows.width, partial(layer.gate_up, i)),),
                "down": (Made(down, columns.num_rows, width, partial(layer.down, i, down)),),
            }
            for i in range(self.count)
        ]

    def _down(self, table: TableHeader) -> str:
        """What down is kept in."""
        (matrix,) = table.tensors["down"]
        if self.learned is not None:
            return learned_encoding(matrix.encoding)
        parts = (self.part(layer, i) for layer in table.keys for i in range(self.count))
        kept = all(_columns(matrix, {}, part) is not None for part in parts)
        return matrix.encoding if kept else more_bits(matrix.encoding)

    def part(self, layer: int, number: int) -> Tensor:
        """Which neurons a piece has."""
        width = self.order_LF.shape[1] // self.count
        return self.order_LF[layer, number * width : (number + 1) * width]


class _Layer:
    """One layer's feed-forward on its way into pieces."""

    def __init__(self, table: TableHeader, number: int, stored: Stored, pieces: Pieces) -> None:
        self._table, self._number, self._stored, self._pieces = table, number, stored, pieces
        self._layer = table.keys[number]

    def _fields(self, name: str) -> Sequence[Fields]:
        return self._stored(self._table, self._number)[name]

    def gate_up(self, number: int) -> Mapping[str, Tensor]:
        """Rows of gate, and below them of up."""
        part, pieces = self._pieces.part(self._layer, number), self._table.tensors["gate_up"]
        found = list(zip(pieces, self._fields("gate_up"), strict=True))
        count = self._pieces.order_LF.shape[1]
        if len(found) == 1:
            return _rows(*found[0], torch.cat([part, part + count]))
        kind = encoding(_rows_encoding(self._table.name, pieces))
        if {m.encoding for m in pieces} == {kind.name}:
            both = [_rows(m, fields, part) for m, fields in found]
            return {name: torch.cat([b[name] for b in both]) for name in both[0]}
        numbers = [encoding(m.encoding).decode(f)[part] for m, f in found]
        return kind.encode(torch.cat(numbers))

    def down(self, number: int, kind: str) -> Mapping[str, Tensor]:
        """Columns of down."""
        (matrix,), (fields,) = self._table.tensors["down"], self._fields("down")
        part = self._pieces.part(self._layer, number)
        if kind == matrix.encoding and (kept := _columns(matrix, fields, part)) is not None:
            return kept
        numbers = encoding(matrix.encoding).decode(fields)[: matrix.num_rows]
        return encoding(kind).encode(numbers[:, part])


@dataclass(frozen=True, slots=True)
class _Learned:
    """One layer's feed-forward that is numbers, in the order of its neurons, on its way into pieces."""

    matrices: Matrices
    kind: str
    width: int  # neurons of a piece

    def gate_up(self, number: int) -> Mapping[str, Tensor]:
        gates, ups = self.matrices[0].chunk(2)
        part = slice(number * self.width, (number + 1) * self.width)
        return encoding(self.kind).encode(torch.cat([gates[part], ups[part]]))

    def down(self, number: int, kind: str) -> Mapping[str, Tensor]:
        part = slice(number * self.width, (number + 1) * self.width)
        return encoding(kind).encode(self.matrices[1][:, part].contiguous())


def dense_tables(base: Pack) -> list[TableHeader]:
    """Of a dense pack's feed-forwards."""
    return [t for t in base.tables if t.kind == "layers" and t.name.startswith("ffn-")]


def check(base: Pack, count: int) -> None:
    """Raise UnsupportedError for a pack that cannot be cut into so many pieces a layer."""
    d, name = base.description, base.path.name
    if d.mixture is not None:
        kind = "is cut into nested experts already" if d.is_nested else "is a mixture of experts"
        raise UnsupportedError(f"{name} {kind}; nested experts are made of dense models")
    if not d.is_usual or d.mlp_bias:
        raise UnsupportedError(
            f"{name} is a {d.family} model; nested experts are made of dense models without biases in "
            "their feed-forwards, and without sinks"
        )
    tables = dense_tables(base)
    unit = 1 if all(t.tensors["down"][0].encoding in ANY for t in tables) else BLOCK
    if d.ffn_width % (count * unit):
        fit = [n for n in range(2, 65) if d.ffn_width % (n * unit) == 0]
        raise UnsupportedError(
            f"{name} has {d.ffn_width:,} neurons a layer, which {count} pieces of multiples of {unit} do not "
            f"divide; give widths in steps of 1/N with N one of {', '.join(map(str, fit)) or 'none'}"
        )
    for table in tables:
        _rows_encoding(table.name, table.tensors["gate_up"])
        if len(table.tensors["down"]) > 1:
            raise UnsupportedError(
                f"{name}: down is in pieces of several encodings, which are not cut"
            )


def more_bits(name: str) -> str:
    """What columns are re-encoded in, where their groups are cut: a bit more, or eight."""
    found = encoding(name)
    bits = found.form.bits if isinstance(found, Palette) else 4 if name in ("int4", "group4") else 8
    return "q5_1" if bits <= 4 else "q8_0"


def learned_encoding(name: str) -> str:
    """What numbers are kept in that were learned in place of those of an encoding."""
    return name if name in (*ANY, "int8") else more_bits(name)


def _rows_encoding(table: str, pieces: Sequence[Matrix]) -> str:
    """What rows are kept in. Raises UnsupportedError."""
    for m in pieces:
        found = encoding(m.encoding)
        if isinstance(found, Palette) and not found.form.levels:
            raise UnsupportedError(
                f"table {table} is in palettes of 16 rows each, which do not follow their neurons; make "
                "nested experts of the pack before --bits"
            )
    names = {m.encoding for m in pieces}
    return names.pop() if len(names) == 1 and _keeps_rows(pieces[0]) else "q8_0"


def _keeps_rows(m: Matrix) -> bool:
    """Do rows keep their codes in another order?"""
    by_row = all(s.row_axis == 0 and s.rows == 1 for s in m.specs.values())
    return by_row or isinstance(encoding(m.encoding), Palette)


def _rows(m: Matrix, fields: Fields, ids: Tensor) -> dict[str, Tensor]:
    """Fields of these rows of a matrix, in this order."""
    kind = encoding(m.encoding)
    if isinstance(kind, Palette):
        codes, scales = _by_row(kind, fields)
        return kind.from_codes(codes[ids].contiguous(), {n: f[ids] for n, f in scales.items()})
    if _keeps_rows(m):
        return {name: field[ids].contiguous() for name, field in fields.items()}
    return encoding("q8_0").encode(kind.decode(fields)[: m.num_rows][ids])


def _by_row(kind: Palette, fields: Fields) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes (N, K), and steps and the like by row."""
    packed = fields["codes"]
    codes = unpack_codes(kind.form.bits, packed).flatten(-2).transpose(1, 2)
    scales = {
        name: field.flatten() if name == "outer" else field.transpose(1, 2).flatten(0, 1)
        for name, field in fields.items()
        if name != "codes"
    }
    return codes.reshape(len(packed) * TILE, -1), scales


def _columns(m: Matrix, fields: Fields, ids: Tensor) -> dict[str, Tensor] | None:
    """Fields of these columns of a matrix, in this order; None where that would cut groups. Without fields:
    what can be done of all columns, and nothing is."""
    kind = encoding(m.encoding)
    if m.encoding in ANY:
        return {name: field[:, ids].contiguous() for name, field in fields.items()}
    if m.encoding == "int8":
        return {n: f[:, ids].contiguous() if n == "codes" else f for n, f in fields.items()}
    if not isinstance(kind, Palette) or "int8" in (kind.form.step, kind.form.low):
        return None
    group = kind.form.group
    firsts = ids[::group]
    whole = len(ids) % group == 0 and bool((firsts % group == 0).all())
    if not whole or not torch.equal(_spread(firsts, group), ids):
        return None
    if not fields:
        return {}
    codes, scales = _by_row(kind, fields)
    some = {n: f if n == "outer" else f[:, firsts // group] for n, f in scales.items()}
    return kind.from_codes(codes[:, ids].contiguous(), some)


def _spread(firsts: Tensor, group: int) -> Tensor:
    """All columns of groups that begin at these."""
    step = torch.arange(group, dtype=torch.int64, device="cpu")
    return (firsts[:, None] + step).flatten()
