"""A rank's weights as a pack of its own: an ordinary pack of a smaller model of the same width.

It is cut out of the model's pack once and kept (`shards/` in the user's folder): paging, reads past the page
cache and checksums work as they are, and no streamed step reads what other ranks hold. Codes are moved,
never made anew. Tables that are whole on every rank are the same bytes on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from outsize.encoding.find import encoding
from outsize.encoding.plain import Inputs
from outsize.model_config import Description
from outsize.model_parts import Shard
from outsize.pack.derive import derive, made_before
from outsize.pack.format import Pack
from outsize.pack.kinds.kind import groups
from outsize.pack.kinds.layers import FINAL, tables_of
from outsize.pack.outline import Outline, head_of
from outsize.pack.records import FLOATS
from outsize.pack.source import Source, derived
from outsize.pack.tables import Matrix, TableHeader
from outsize.pack.tensors import Made, Record, TablePlan
from outsize.parallel.split import UNCUT
from outsize.progress import Progress, silent
from outsize.storage.records import Records
from outsize.storage.table import Weights

FOLDER = "shards"


def source_of(pack: Pack, shard: Shard) -> Source:
    """What names a shard: the pack's numbers, and which of them."""
    numbers = {name: value for name, value in asdict(shard).items() if name != "orders" or value}
    return derived(pack.source, f"rank{shard.rank}of{shard.world}", {"shard": numbers})


def described(d: Description, shard: Shard) -> Description:
    """The smaller model that a rank runs."""
    first, last = shard.neurons
    heads, kv_heads = (b - a for a, b in (shard.heads, shard.kv_heads))
    some = replace(d, layers=d.layers[slice(*shard.layers)], shard=shard)
    return replace(some, num_heads=heads, num_kv_heads=kv_heads, ffn_width=last - first)


def cut(pack: Pack, shard: Shard, home: Path, progress: Progress = silent) -> Pack:
    """A rank's pack, out of the model's, or as it was cut before; the model's, where each has all of it.
    Raises PackError, ReadError, DiskFullError, UnsupportedError."""
    if shard.cut in UNCUT:
        return pack
    source, base = (
        source_of(pack, shard),
        replace(pack, description=described(pack.description, shard)),
    )
    found = made_before(base, source, home / FOLDER)
    if found is not None:
        return found
    with Records(pack) as records:
        tables = _Cutter(pack.description, pack.tables, shard, (pack.path, records)).tables()
        return derive(base, source, tables, None, home / FOLDER, progress)


def outlined(whole: Outline, shard: Shard) -> Outline:
    """A shard of a model as the planner sees it, from headers alone. Ranks that follow have no tokenizer, no
    templates, and of the head no more than rows by id."""
    if shard.cut in UNCUT:
        return whole if shard.rank == 0 else following(whole)
    d = whole.description
    tables = [plan.header for plan in _Cutter(d, whole.tables, shard, None).tables()]
    made = replace(whole, description=described(d, shard), tables=tuple(tables))
    return made if shard.rank == 0 else following(made)


def following(o: Outline) -> Outline:
    """Of a rank that follows."""
    head = head_of(o.description)
    tables = (replace(t, keys=t.keys[:1]) if t.name == head else t for t in o.tables)
    return replace(o, tables=tuple(tables), tokenizer_bytes=0, has_template=False)


class _Cutter:
    """The tables of a shard, out of a pack's."""

    def __init__(
        self,
        d: Description,
        tables: Sequence[TableHeader],
        shard: Shard,
        there: tuple[Path, Records] | None,
    ) -> None:
        """`there`: the pack's folder and its records; None: only headers are asked for."""
        self._d, self._tables, self._shard, self._there = d, tables, shard, there
        self._rows, self._inputs = _rows(d, shard, 0), _inputs(d, shard, 0)
        self._layer = 0  # that these are of

    def tables(self) -> list[TablePlan]:
        out: list[TablePlan] = []
        if self._shard.cut == "layers":
            return self._some_layers()
        folder = Path() if self._there is None else self._there[0]
        for _, group in groups(self._d):
            tables = [t for t in self._tables if t.name.split("-")[0] == group.name]
            names = {name for t in tables for name in t.tensors}
            if not names & (self._rows.keys() | self._inputs.keys()):
                out += [TablePlan(t, (), folder / t.file) for t in tables]
                continue
            by_layer = {
                layer: self._record(t, number)
                for t in tables
                for number, layer in enumerate(t.keys)
            }
            layers = sorted(by_layer)
            records = [by_layer[layer] for layer in layers]
            out += tables_of(group.name, "layers", records, layers=layers)
        return out

    def _some_layers(self) -> list[TablePlan]:
        """Records of some layers, as they are, under new numbers."""
        out: list[TablePlan] = []
        folder, (first, last) = (
            Path() if self._there is None else self._there[0],
            self._shard.layers,
        )
        for _, group in groups(self._d):
            tables = [t for t in self._tables if t.name.split("-")[0] == group.name]
            if group.name == FINAL or any(t.kind == "rows" for t in tables):
                out += [TablePlan(t, (), folder / t.file) for t in tables]
                continue
            kind = tables[0].kind
            each = 1 if kind == "layers" or self._d.mixture is None else self._d.mixture.count
            by_key = {
                key: self._record(t, number)
                for t in tables
                for number, key in enumerate(t.keys)
                if first <= key // each < last
            }
            records = [by_key[key] for key in sorted(by_key)]
            layers = sorted({key // each - first for key in by_key})
            out += tables_of(group.name, kind, records, each, layers) if records else []
        return out

    def _record(self, table: TableHeader, number: int) -> Record:
        layer = table.keys[number]
        if self._shard.orders and layer != self._layer:
            self._rows, self._inputs = (f(self._d, self._shard, layer) for f in (_rows, _inputs))  # type: ignore[assignment]
            self._layer = layer
        return {
            name: self._tensor(table, number, name, matrices)
            for name, matrices in sorted(table.tensors.items())
        }

    def _tensor(
        self, table: TableHeader, number: int, name: str, matrices: Sequence[Matrix]
    ) -> tuple[Made, ...]:
        rows, inputs = self._rows.get(name), self._inputs.get(name)
        is_vector = name in self._rows and all(m.num_rows == 1 for m in matrices)
        if is_vector:
            make = partial(self._numbers, table, number, name, rows)
            return (Made(FLOATS, 1, len(self._rows[name]), make),)
        out, at = [], 0
        for piece, m in enumerate(matrices):
            mine = None if rows is None else rows[(rows >= at) & (rows < at + m.num_rows)] - at
            at += m.num_rows
            count = m.num_rows if mine is None else len(mine)
            width = m.width if inputs is None else sum(run.stop - run.start for run in inputs)
            make = partial(self._fields, table, number, (name, piece), mine, inputs)
            if count:
                out.append(Made(m.encoding, count, width, make))
        return tuple(out)

    def _fields(
        self,
        table: TableHeader,
        number: int,
        place: tuple[str, int],
        rows: Tensor | None,
        inputs: Inputs,
    ) -> Mapping[str, Tensor]:
        name, piece = place
        weight = self._read(table, number)[name][piece]
        if rows is None and inputs is None:
            return weight.fields
        return weight.encoding.take(weight.fields, rows, inputs)

    def _read(self, table: TableHeader, number: int) -> Weights:
        assert self._there is not None
        return self._there[1].read(table, number)

    def _numbers(
        self, table: TableHeader, number: int, name: str, rows: Tensor | None
    ) -> Mapping[str, Tensor]:
        """Some of a vector's."""
        pieces = self._read(table, number)[name]
        whole = torch.cat([w.encoding.decode(w.fields)[0] for w in pieces])
        return encoding(FLOATS).encode(whole[rows][None])


def _rows(d: Description, s: Shard, layer: int) -> dict[str, Tensor]:
    """Of a layer's tensors that are cut by rows (vectors: by numbers), those of a shard."""
    if s.cut == "layers":
        return {}
    neurons = torch.arange(*s.neurons, dtype=torch.int64, device="cpu")
    found = {"gate_up": torch.cat([neurons, d.ffn_width + neurons])}
    if d.mlp_bias:
        found["gate_up_bias"] = found["gate_up"]
    if s.cut == "gather":
        found["down"] = torch.arange(*s.outputs, dtype=torch.int64, device="cpu")
    if s.attention == "heads":
        found |= _head_rows(d, s, layer)
    return found


def _head_rows(d: Description, s: Shard, layer: int) -> dict[str, Tensor]:
    """Query, key and value heads, and their biases and sinks."""
    each, keys = d.num_heads // d.num_kv_heads, s.keys(layer)
    heads = [k * each + i for k in keys for i in range(each)]
    query, key = (torch.tensor(x, dtype=torch.int64, device="cpu") for x in (heads, keys))
    inner = torch.arange(d.head_dim, dtype=torch.int64, device="cpu")
    first = (0, d.num_heads, d.num_heads + d.num_kv_heads)
    all_ = torch.cat([start + some for start, some in zip(first, (query, key, key), strict=True)])
    rows = (all_[:, None] * d.head_dim + inner).flatten()
    found = {"qkv": rows}
    if d.qkv_bias:
        found["qkv_bias"] = rows
    if d.sinks:
        found["sinks"] = query
    return found


def _inputs(d: Description, s: Shard, layer: int) -> dict[str, Inputs]:
    """Of a layer's matrices that are cut by inputs, those of a shard."""
    found: dict[str, Inputs] = {"down": (slice(*s.neurons),)} if s.cut == "sum" else {}
    if s.attention == "heads":
        each = d.num_heads // d.num_kv_heads * d.head_dim
        found["o"] = tuple(slice(k * each, (k + n) * each) for k, n in _runs(s.keys(layer)))
    return found


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and count of numbers that follow each other."""
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and sum(found[-1]) == n:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((n, 1))
    return found
