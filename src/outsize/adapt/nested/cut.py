"""A dense pack -> the same pack with its feed-forwards cut into nested experts (pack/increments.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from outsize.home import home
from outsize.pack import derive, increments
from outsize.pack.format import Pack
from outsize.pack.increments import Pieces
from outsize.pack.source import derived
from outsize.pack.tables import TableHeader
from outsize.progress import Progress
from outsize.storage.records import Records

METHOD = 1  # raise it where the same order would give other records


def cut(base: Pack, count: int, order_LF: Tensor, progress: Progress) -> Pack:
    """So many pieces a layer, of its neurons in this order; found, if it was made before. Raises
    UnsupportedError, PackError, DiskFullError."""
    increments.check(base, count)
    pieces = Pieces(base, count, order_LF)
    recipe = {"made": "nested", "method": METHOD, "count": count, "order": pieces.digest}
    source = derived(base.source, f"nested{count}", recipe)
    with Records(base) as records:

        def stored(table: TableHeader, number: int) -> dict[str, list[Mapping[str, Tensor]]]:
            read = records.read(table, number)
            return {name: [w.fields for w in weights] for name, weights in read.items()}

        tables = pieces.tables(stored)
        like = replace(base, description=pieces.description)
        return derive.derive(like, source, tables, None, home() / "packs", progress)
