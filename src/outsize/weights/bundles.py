"""The folder of a pack's neurons, beside the pack: its feed-forwards cut into bundles (pack/bundles.py),
made once from the pack's own records and checked as those are.

    neurons.json          what it was made of, and checksums
    neurons-0.records     bundles of the layers of table ffn-0
    shared-0.records      what a layer's bundles share, one record a layer: norms, biases
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outsize.checkpoint.bounded import read_regular
from outsize.checkpoint.read_json import loads
from outsize.errors import DiskFullError, OutsizeError, PackError, UnsupportedError
from outsize.pack import bundle_rows, bundles
from outsize.pack.bundle_rows import whole_rows
from outsize.pack.bundles import BundleLayout, Prepared, cut, shared_fields, whole_columns
from outsize.pack.folders import rename, sync
from outsize.pack.format import Pack
from outsize.pack.lock import locked
from outsize.pack.tables import TableHeader
from outsize.progress import Progress
from outsize.storage.records import Records
from outsize.storage.table import Weights

VERSION, HEADER = 1, "neurons.json"
NATURAL = ""  # neurons in their own order
SLACK = 64 << 20  # bytes that a file system wants for itself
MOST_HEADER = 64 << 20  # bytes: 10 for each bundle's checksum


@dataclass(frozen=True, slots=True)
class BundleTable:
    """The bundles of one table of feed-forwards, and what they share by layer."""

    dense: TableHeader
    form: BundleLayout
    bundles: TableHeader
    shared: TableHeader

    @property
    def layers(self) -> tuple[int, ...]:
        return self.dense.keys


@dataclass(frozen=True, slots=True)
class Bundles:
    """All of a model's neurons, cut in bundles. `path`: their folder."""

    path: Path
    tables: tuple[BundleTable, ...]

    @property
    def bundle(self) -> int:
        """Neurons of a bundle."""
        return self.tables[0].form.bundle

    @property
    def count(self) -> int:
        """Bundles of a layer."""
        return self.tables[0].form.count

    @property
    def size(self) -> int:
        return sum(t.bundles.size + t.shared.size for t in self.tables)


def bundles_of(pack: Pack, bundle: int | None = None, order: str = NATURAL) -> Bundles:
    """How a pack's neurons are cut, by headers alone; the tables' checksums are empty. `order`: a digest
    of how they are ordered, then by rows; NATURAL: neighbours as they are. Raises UnsupportedError."""
    name, d = pack.path.name, pack.description
    if d.mixture is not None:
        raise UnsupportedError(
            f"{name} is a mixture of experts, which are paged as they are: use --experts; neurons are of "
            "dense models"
        )
    dense = [t for t in pack.tables if t.kind == "layers" and t.name.startswith("ffn-")]
    kind = bundles if order == NATURAL else bundle_rows
    size = bundle or max(kind.bundle_of(t) for t in dense)
    tables = tuple(_table(t, kind.layout(t, size), number) for number, t in enumerate(dense))
    ending = f"{size}" if order == NATURAL else f"{size}-{order}"
    return Bundles(pack.path.with_name(f"{name}.neurons-{ending}"), tables)


def _table(dense: TableHeader, form: BundleLayout, number: int) -> BundleTable:
    keys = tuple(i * form.count + b for i in dense.keys for b in range(form.count))
    _, size = shared_fields(dense, form)
    return BundleTable(
        dense,
        form,
        TableHeader(f"neurons-{number}", "neurons", keys, form.stride, {}, ()),
        TableHeader(f"shared-{number}", "neurons", dense.keys, size, {}, ()),
    )


def find(pack: Pack, bundle: int, order: str = NATURAL) -> Bundles:
    """The folder as it was made for this very pack. Raises PackError."""
    wanted = bundles_of(pack, bundle, order)
    body = _body(wanted.path)
    if body.get("pack") != _about(pack) or body.get("version") != VERSION:
        raise _unusable(wanted.path, "it was made of another pack, or by another outsize")
    sums = body.get("checksums")
    tables = tuple(_with_sums(wanted.path, t, sums) for t in wanted.tables)
    return replace(wanted, tables=tables)


def _with_sums(path: Path, table: BundleTable, sums: object) -> BundleTable:
    found = []
    for header in (table.bundles, table.shared):
        some: Any = sums.get(header.name) if isinstance(sums, dict) else None
        is_sound = isinstance(some, list) and len(some) == len(header.keys)
        if not is_sound or not all(type(n) is int and 0 <= n < 1 << 32 for n in some):
            raise _unusable(path, f"it has no checksums of {header.name}")
        file = path / header.file
        if not file.is_file() or file.stat().st_size != header.size:
            raise _unusable(path, f"{header.file} is not of {header.size:,} bytes")
        found.append(replace(header, checksums=tuple(some)))
    return replace(table, bundles=found[0], shared=found[1])


def _body(path: Path) -> Mapping[str, object]:
    try:
        whole: Any = loads(read_regular(path / HEADER, MOST_HEADER, PackError).decode())
        body = whole["neurons"]
        good = zlib.crc32(json.dumps(body, sort_keys=True).encode()) == whole["checksum"]
    except (PackError, ValueError, KeyError, TypeError) as e:
        raise _unusable(path, f"its header cannot be read ({type(e).__name__})") from None
    if not good or not isinstance(body, dict):
        raise _unusable(path, "its header does not match its checksum")
    return body


def _unusable(path: Path, problem: str) -> PackError:
    return PackError(
        f"the neurons {path} are not usable: {problem}; `outsize adapt sparsity` makes them again"
    )


def _about(pack: Pack) -> list[str]:
    return [pack.source.identity, pack.source.layout]


def make(
    pack: Pack, bundle: int | None, progress: Progress, order_LF: Tensor | None = None
) -> Bundles:
    """The folder, made if it is not there; in `order_LF`, bundles are of few neurons, by rows. Raises
    UnsupportedError, PackError, DiskFullError."""
    order = NATURAL if order_LF is None else digest(order_LF)
    wanted = bundles_of(pack, bundle, order)
    try:
        return _made(pack, wanted, order, progress, order_LF)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(wanted) from None
        raise PackError(f"cannot write {wanted.path}: {e.strerror}") from None


def _made(
    pack: Pack, wanted: Bundles, order: str, progress: Progress, order_LF: Tensor | None
) -> Bundles:
    """Raises OSError, too."""
    with locked(wanted.path.with_name(f".{wanted.path.name}.lock")) as is_alone:
        with suppress(OutsizeError):
            return find(pack, wanted.bundle, order)
        for stale in wanted.path.parent.glob(f".{wanted.path.name}.tmp-*") if is_alone else ():
            shutil.rmtree(stale, ignore_errors=True)
        if wanted.path.exists():
            shutil.rmtree(wanted.path)
        _check_room(wanted)
        folder = wanted.path.with_name(
            f".{wanted.path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        )
        try:
            folder.mkdir()
            _write(pack, wanted, folder, progress, order_LF)
            sync(folder)
            rename(folder, wanted.path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return find(pack, wanted.bundle, order)


def _check_room(wanted: Bundles) -> None:
    if shutil.disk_usage(wanted.path.parent).free < wanted.size + SLACK:
        raise _full(wanted)


def _full(wanted: Bundles) -> DiskFullError:
    free = shutil.disk_usage(wanted.path.parent).free
    return DiskFullError(
        f"neurons need {(wanted.size + SLACK) / 1e6:,.0f} MB in {wanted.path.parent}, "
        f"{free / 1e6:,.0f} MB are free; make room, or remove packs with `outsize rm`"
    )


def _write(
    pack: Pack, wanted: Bundles, folder: Path, progress: Progress, order_LF: Tensor | None
) -> None:
    sums: dict[str, Sequence[int]] = {}
    done, total = 0, sum(t.bundles.size for t in wanted.tables)
    with Records(pack) as records:
        for table in wanted.tables:
            names = table.bundles, table.shared
            sums |= {header.name: [] for header in names}
            with (
                open(folder / names[0].file, "wb") as out,
                open(folder / names[1].file, "wb") as on,
            ):
                for number in range(len(table.layers)):
                    order = None if order_LF is None else order_LF[table.layers[number]]
                    some = list(_records(table, records.read(table.dense, number), order))
                    out.write(b"".join(some[:-1]))
                    on.write(some[-1])
                    crcs = [zlib.crc32(raw) for raw in some]
                    sums[names[0].name] = [*sums[names[0].name], *crcs[:-1]]
                    sums[names[1].name] = [*sums[names[1].name], crcs[-1]]
                    done += table.form.stride * table.form.count
                    progress("cutting neurons", done, total)
    body = {"version": VERSION, "pack": _about(pack), "checksums": sums}
    text = json.dumps(body, sort_keys=True)
    whole = {"checksum": zlib.crc32(text.encode()), "neurons": body}
    (folder / HEADER).write_text(json.dumps(whole, sort_keys=True), encoding="utf-8")


def _records(table: BundleTable, read: Weights, order_F: Tensor | None) -> Iterator[bytes]:
    """A layer's bundles in order, then what they share."""
    form, whole = table.form, prepared(table, read, order_F)
    for b in range(form.count):
        yield bytes(cut(form, whole, b))
    fields, size = shared_fields(table.dense, form)
    raw = bytearray(size)
    for f in fields:
        some = read[f.tensor][f.piece].fields[f.field]
        if f.tensor == "gate_up_bias" and order_F is not None:
            some = some.view(-1, form.neurons)[:, order_F]
        data = some.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        raw[f.offset : f.offset + len(data)] = data
    yield bytes(raw)


def prepared(table: BundleTable, read: Weights, order_F: Tensor | None) -> Prepared:
    """What a layer's bundles are cut out of, from its dense record."""
    gate_up = read["gate_up"]
    if order_F is None:
        return whole_columns(table.form, [w.fields for w in gate_up], read["down"][0].fields)
    pieces = list(zip(table.dense.tensors["gate_up"], [w.fields for w in gate_up], strict=True))
    down = [w.encoding.decode(w.fields)[: w.num_rows] for w in read["down"]]
    return whole_rows(table.form, pieces, torch.cat(down), order_F)


def digest(order_LF: Tensor) -> str:
    """What names an order of all layers' neurons."""
    return hashlib.sha256(order_LF.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()[:12]
