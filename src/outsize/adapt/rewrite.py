"""A pack written anew with some of its layers' matrices changed: encoded as those that they replace, under an
identity of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from outsize.adapt.statistics import TENSORS
from outsize.encoding.find import encoding, encoding_like
from outsize.home import home
from outsize.model_config import Description
from outsize.pack import derive
from outsize.pack.derive import New
from outsize.pack.format import Pack, Quality
from outsize.pack.source import Source
from outsize.pack.tables import Matrix, TableHeader
from outsize.pack.tensors import Made
from outsize.progress import Progress
from outsize.storage.records import Records
from outsize.storage.table import Weight


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the new pack is. `quality`: as measured when it was made; its bits are counted as it is written."""

    source: Source
    quality: Quality | None = None


def write(
    base: Pack, records: Records, new: New, d: Description, who: Identity, progress: Progress
) -> Pack:
    """The pack of a model described by `d`; of what `new` does not name, the base's own records. Raises
    PackError, DiskFullError."""
    tables = derive.tables_with(base, partial(stored, records), new, d)
    of, quality = replace(base, description=d), who.quality
    if quality is not None:
        quality = replace(quality, bits=bits_of([t.header for t in tables]))
    return derive.derive(of, who.source, tables, quality, home() / "packs", progress)


def bits_of(tables: Sequence[TableHeader]) -> float:
    """Of a weight of the layers' matrices, everything counted."""
    found = [
        (len(t.keys), m)
        for t in tables
        for name, pieces in t.tensors.items()
        if name in TENSORS and t.kind == "layers"
        for m in pieces
    ]
    weights = sum(count * m.num_rows * m.width for count, m in found)
    return 8 * sum(count * m.size for count, m in found) / weights


def stored(
    records: Records, table: TableHeader, number: int
) -> dict[str, list[Mapping[str, Tensor]]]:
    """The fields of a record, as they are."""
    return {
        name: [w.fields for w in weights] for name, weights in records.read(table, number).items()
    }


def encoded(w_NK: Tensor, name: str) -> tuple[Made, ...]:
    """A matrix that will be encoded when it is written."""
    num_rows, width = w_NK.shape
    return (Made(name, num_rows, width, partial(_fields, w_NK, name)),)


def decoded(w_NK: Tensor, name: str) -> Tensor:
    """(N, K) fp32: what a matrix is once it was encoded."""
    return encoding(name).decode(_fields(w_NK, name))[: len(w_NK)]


def _fields(w_NK: Tensor, name: str) -> Mapping[str, Tensor]:
    return encoding(name).encode(w_NK.detach().float().cpu())


def first_rows(pieces: Sequence[Weight], count: int) -> tuple[Made, ...]:
    """The first rows of a matrix, with the very codes that they have where rows lie apart."""
    out, left = list[Made](), count
    for piece in pieces:
        if left <= 0:
            break
        rows = min(left, piece.num_rows)
        out.append(_some_rows(piece, rows))
        left -= rows
    return tuple(out)


def _some_rows(piece: Weight, rows: int) -> Made:
    name, width = piece.encoding.name, _width(piece)
    specs = Matrix(name, rows, width, 0).specs
    fields = {k: piece.fields[k] for k in specs}
    if rows == piece.num_rows:
        return Made(name, rows, width, lambda: fields)
    if all(rows % spec.rows == 0 for spec in specs.values()):
        cut = {
            k: fields[k].narrow(spec.row_axis, 0, spec.shape[spec.row_axis]).contiguous()
            for k, spec in specs.items()
        }
        return Made(name, rows, width, lambda: cut)
    whole = piece.encoding.decode(piece.fields)[:rows]
    return encoded(whole, encoding_like(name, width))[0]


def _width(piece: Weight) -> int:
    return int(piece.encoding.decode(piece.fields).shape[1])


def first_numbers(pieces: Sequence[Weight], count: int) -> tuple[Made, ...]:
    """The first numbers of a vector."""
    whole = torch.cat([w.encoding.decode(w.fields).flatten() for w in pieces])[:count]
    return vector(whole)


def vector(numbers: Tensor) -> tuple[Made, ...]:
    """A vector, as packs keep them: in fp32."""
    return encoded(numbers[None], "fp32")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name: of what was learned, which decides a pack's identity."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
