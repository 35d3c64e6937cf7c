"""A dense pack -> the same pack with its feed-forwards cut into nested experts (pack/increments.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from outsize.adapt.rewrite import digest
from outsize.home import home
from outsize.pack import derive, increments
from outsize.pack.format import Pack, Quality
from outsize.pack.increments import Matrices, Pieces
from outsize.pack.source import derived
from outsize.pack.tables import TableHeader
from outsize.progress import Progress
from outsize.storage.records import Records

METHOD = 1  # raise it where the same order would give other records
TUNED = "-tuned"  # how names end whose feed-forwards were tuned


@dataclass(frozen=True, slots=True)
class Learned:
    """Feed-forwards that are cut in place of a pack's own: gate over up and down by layer, in the order of
    their neurons; and how far all of them take its predictions from the former ones."""

    matrices: Sequence[Matrices]
    quality: Quality

    @property
    def digest(self) -> str:
        """What names them."""
        return digest(
            {f"{i}.{n}": m for i, pair in enumerate(self.matrices) for n, m in enumerate(pair)}
        )


def cut(
    base: Pack,
    count: int,
    order_LF: Tensor,
    progress: Progress,
    learned: Learned | None = None,
) -> Pack:
    """So many pieces a layer, of its neurons in this order; found, if it was made before. Raises
    UnsupportedError, PackError, DiskFullError."""
    increments.check(base, count)
    pieces = Pieces(base, count, order_LF, None if learned is None else learned.matrices)
    recipe = {"made": "nested", "method": METHOD, "count": count, "order": pieces.digest}
    name = f"nested{count}"
    if learned is not None:
        recipe |= {"learned": learned.digest}
        name += TUNED
    source = derived(base.source, name, recipe)
    with Records(base) as records:

        def stored(table: TableHeader, number: int) -> dict[str, list[Mapping[str, Tensor]]]:
            read = records.read(table, number)
            return {name: [w.fields for w in weights] for name, weights in read.items()}

        tables = pieces.tables(stored)
        like = replace(base, description=pieces.description)
        quality = None if learned is None else learned.quality
        return derive.derive(like, source, tables, quality, home() / "packs", progress)
