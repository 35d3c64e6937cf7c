"""A pack -> another pack: its numbers changed, by a recipe; streamed, atomic, locked, as any pack is.

The new pack is another model, with an identity of its own: what was trained for the old one is refused, but
for what is verified (drafters), where only speed is at stake (`Source.kin`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from outsize.errors import PackError
from outsize.model_config import Description
from outsize.pack import tokenizer_file
from outsize.pack.folders import safe
from outsize.pack.format import Pack, Quality, read_header
from outsize.pack.kinds.kind import groups
from outsize.pack.kinds.layers import SHARING, layers_of, tables_of
from outsize.pack.layout import fault
from outsize.pack.lock import locked
from outsize.pack.source import Source
from outsize.pack.tables import TableHeader
from outsize.pack.tensors import Made, Record, TablePlan
from outsize.pack.write import write_whole
from outsize.progress import Progress

# The fields of a table's record as it is: of each tensor, of its pieces.
Stored = Callable[[TableHeader, int], Mapping[str, Sequence[Mapping[str, Tensor]]]]
New = Mapping[
    tuple[int, str], tuple[Made, ...]
]  # by layer and tensor: qkv, o, gate_up, down, a norm
# Tables of layers, and those of a pack that their records are made from.
OF_LAYERS = {"attn": "attn", SHARING: "attn", "ffn": "ffn"}


def path_of(base: Pack, source: Source, home: Path) -> Path:
    """The folder of the pack that is made from another one."""
    stem = base.path.name.split(f"-{base.source.identity[:12]}")[0]
    return home / f"{safe(stem)}-{source.identity[:12]}-{source.encoding}"


def made_before(base: Pack, source: Source, home: Path) -> Pack | None:
    """The pack, if this very one was made."""
    with suppress(PackError):
        found = read_header(path_of(base, source, home))
        return found if found.source.sha256 == source.sha256 else None
    return None


def derive(
    base: Pack,
    source: Source,
    tables: Sequence[TablePlan],
    quality: Quality | None,
    home: Path,
    progress: Progress,
) -> Pack:
    """Write the pack, or find that another process did. `base`: with the new description, where that is
    another one. Raises PackError, DiskFullError."""
    if problem := fault(base.description, [t.header for t in tables]):
        raise PackError(f"{base.path.name} cannot be made anew: {problem}")
    final = path_of(base, source, home)
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / f".{final.name}.lock") as is_alone:
        if (found := made_before(base, source, home)) is not None:
            return found
        if final.exists():
            shutil.rmtree(final)
        draft = replace(base, path=final, source=source, tables=(), quality=quality)
        text = partial(tokenizer_file.read, base.path)
        return write_whole(draft, text, tables, progress, None, is_alone)


def tables_with(
    base: Pack, stored: Stored, new: New, d: Description | None = None
) -> list[TablePlan]:
    """The tables of a pack, with some of its layers' matrices in place of its own. `d`: the description of
    the model that it becomes, where it is another."""
    d, out = d or base.description, list[TablePlan]()
    for _, group in groups(d):
        of = OF_LAYERS.get(group.name)
        if of is None:
            tables = [t for t in base.tables if t.name.split("-")[0] == group.name]
            out += [kept(table, stored) for table in tables]
            continue
        found = {
            layer: record_of(table, number, stored)
            for table in base.tables
            if table.name.split("-")[0] == of
            for number, layer in enumerate(table.keys)
        }
        layers = layers_of(d, group.name)
        records: list[Record] = []
        for layer in layers:
            record = {name: found[layer][name] for name in found[layer] if name in group.specs}
            records.append(record | {n: new[layer, n] for n in record if (layer, n) in new})
        out += tables_of(group.name, "layers", records, layers=layers)
    return out


def kept(table: TableHeader, stored: Stored) -> TablePlan:
    """A table as it is."""
    records = tuple(record_of(table, i, stored) for i in range(len(table.keys)))
    return TablePlan(replace(table, checksums=()), records)


def record_of(table: TableHeader, number: int, stored: Stored) -> Record:
    """A record as it is; tensors by name, so that a pack as it was made and as it is read give the same."""

    def fields(name: str, piece: int) -> Mapping[str, Tensor]:
        return stored(table, number)[name][piece]

    return {
        name: tuple(
            Made(m.encoding, m.num_rows, m.width, partial(fields, name, i))
            for i, m in enumerate(matrices)
        )
        for name, matrices in sorted(table.tensors.items())
    }
