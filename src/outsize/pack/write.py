"""checkpoint -> pack: streamed, atomic, locked. A pack appears under its name only when whole.

Peak memory is a few tensors: one matrix is read, encoded and written at a time. The folder is written
under a temporary name, synced, and renamed; a killed packer leaves only a temporary folder, which the
next one removes.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from outsize.checkpoint import tokenizer as tokenizers
from outsize.checkpoint.foreign import Checkpoint, read_codes, read_floats
from outsize.checkpoint.ggml import Floats
from outsize.encoding.find import encoding
from outsize.encoding.group import Group
from outsize.encoding.int4 import Int4
from outsize.errors import DiskFullError, PackError, SourceError
from outsize.family.find import recipe as find_recipe
from outsize.pack import store
from outsize.pack.folders import rename, safe, sync
from outsize.pack.format import (
    HEADER,
    TOKENIZER,
    Matrix,
    Pack,
    TableHeader,
    read_header,
    write_header,
)
from outsize.pack.identity import Progress, hash_files, identity, layout
from outsize.pack.lock import locked
from outsize.pack.parts import Part, Piece, Record, TablePlan
from outsize.pack.plan import lossy_tensors, plan
from outsize.pack.source import Source, file_stats

SLACK = 64 << 20  # bytes that a file system wants for itself


@dataclass(frozen=True, slots=True)
class How:
    """What to write: the source as its user named it, the encoding asked for, whether our kernels
    for grouped encodings run here, and the version that writes."""

    spec: str
    wanted: str
    grouped: bool
    version: str


def write(
    checkpoint: Checkpoint,
    how: How,
    home: Path,
    progress: Progress,
    warn: Callable[[str], None],
    say: Callable[[str], None],
) -> Pack:
    """Pack a checkpoint into `home`, or find that another process did. Raises OutsizeError."""
    tokenizers.check(checkpoint.tokenizer)  # before anything is encoded
    recipe = find_recipe(checkpoint)
    tables = plan(checkpoint, recipe, how.wanted, how.grouped)
    lossy = lossy_tensors(tables)
    if lossy:
        warn(
            f"{len(lossy)} tensors (the first is {lossy[0]}) are Q2_K or Q3_K and are re-encoded "
            "as int4, which changes their numbers a little; a Q4_K_M file is kept exactly"
        )
    source = _source(checkpoint, how, tables, home, progress)
    stem = checkpoint.files[0].stem if checkpoint.format == "gguf" else Path(how.spec).name
    name = f"{safe(stem)}-{source.identity[:12]}-{how.wanted}"
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / f".{name}.lock") as is_alone:
        final = home / name
        if final.exists():
            with suppress(PackError):
                return _again(read_header(final), source)
            shutil.rmtree(final)
        text = checkpoint.tokenizer
        draft = Pack(
            path=final, source=source, description=recipe.description, tables=(), bos=text.bos,
            eos=text.eos, add_bos=text.add_bos, tokenizer_crc=0, special_tokens=text.names,
            chat_templates=text.templates, licence=checkpoint.licence, made_by=how.version,
        )  # fmt: skip
        twin = store.same_records(home, source)
        if twin is None:
            free, size = shutil.disk_usage(home).free, sum(t.header.size for t in tables)
            say(f"packing {size / 1e6:,.0f} MB into {final} ({free / 1e9:,.1f} GB free)")
        made = _write_whole(draft, checkpoint, tables, twin, progress, is_alone)
    if twin is not None and _succeeds(source, twin.source):
        with suppress(SourceError):  # another process was first
            store.remove(home, twin.path.name)
    return made


def _succeeds(new: Source, old: Source) -> bool:
    """Is that the same model, packed the same way, as it was before?"""
    return (new.spec, new.encoding) == (old.spec, old.encoding)


def _source(
    checkpoint: Checkpoint, how: How, tables: Sequence[TablePlan], home: Path, progress: Progress
) -> Source:
    stats, beside = file_stats(checkpoint.files), checkpoint.sidecars
    digest = store.known_hash(home, stats) or hash_files(checkpoint.files, progress)
    return Source(
        how.spec, digest, sum(size for _, size, _, _ in stats), stats, how.wanted,
        file_stats(beside), identity(digest, beside), layout(tables),
    )  # fmt: skip


def _again(pack: Pack, source: Source) -> Pack:
    """The same bytes under another name: remember the newest one."""
    if pack.source == source:
        return pack
    pack = replace(pack, source=source)
    temporary = pack.path / f".{os.getpid()}"
    temporary.mkdir()
    write_header(pack, temporary)
    os.replace(temporary / HEADER, pack.path / HEADER)
    temporary.rmdir()
    return pack


def _write_whole(
    draft: Pack,
    checkpoint: Checkpoint,
    tables: Sequence[TablePlan],
    twin: Pack | None,
    progress: Progress,
    is_alone: bool,
) -> Pack:
    """The pack, under its name; its records are those of `twin` if there is one. Where locks keep nobody out,
    others may be writing the same: they are left alone, and the first to end wins."""
    home, name = draft.path.parent, draft.path.name
    for stale in home.glob(f".{name}.tmp-*") if is_alone else ():
        shutil.rmtree(stale, ignore_errors=True)
    if twin is None:
        _check_room(home, sum(t.header.size for t in tables))
    folder = home / f".{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        headers = None if twin is None else store.link_tables(folder, twin)
        headers = headers or _write_tables(folder, tables, progress)
        pack = _write_text(replace(draft, tables=headers), folder, checkpoint)
        sync(folder)
        if not rename(folder, draft.path):
            return read_header(draft.path)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(home, sum(t.header.size for t in tables)) from None
        raise PackError(f"cannot write the pack in {home}: {e.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return pack


def _check_room(home: Path, size: int) -> None:
    if shutil.disk_usage(home).free < size + SLACK:
        raise _full(home, size)


def _full(home: Path, size: int) -> DiskFullError:
    free = shutil.disk_usage(home).free
    return DiskFullError(
        f"the pack needs {(size + SLACK) / 1e6:,.0f} MB in {home}, {free / 1e6:,.0f} MB are free; "
        "make room, remove packs with `outsize rm`, or set OUTSIZE_HOME to another disk"
    )


def _write_text(draft: Pack, folder: Path, checkpoint: Checkpoint) -> Pack:
    """Tokenizer and header."""
    text = tokenizers.build(checkpoint.tokenizer).to_str().encode()
    (folder / TOKENIZER).write_bytes(text)
    pack = replace(draft, tokenizer_crc=zlib.crc32(text))
    write_header(pack, folder)
    return pack


def _write_tables(
    folder: Path, tables: Sequence[TablePlan], progress: Progress
) -> tuple[TableHeader, ...]:
    total, done, headers = sum(t.header.size for t in tables), 0, []
    for table in tables:
        tick = partial(_tick, progress, done, total)
        headers.append(_write_table(table, folder, tick))
        done += table.header.size
    return tuple(headers)


def _tick(progress: Progress, before: int, total: int, done: int) -> None:
    progress("packing", before + done, total)


def _write_table(table: TablePlan, folder: Path, tick: Callable[[int], None]) -> TableHeader:
    header, sums = table.header, []
    with open(folder / header.file, "wb") as f:
        for number, record in enumerate(table.records):
            sums.append(_write_record(f, header, record))
            tick((number + 1) * header.stride)
    return replace(header, checksums=tuple(sums))


def _write_record(f: BinaryIO, header: TableHeader, record: Record) -> int:
    buffer = bytearray(header.stride)
    for name, pieces in record.items():
        for matrix, piece in zip(header.tensors[name], pieces, strict=True):
            _put(buffer, matrix, _encode(piece, matrix.num_rows))
    f.write(buffer)
    return zlib.crc32(buffer)


def _put(buffer: bytearray, matrix: Matrix, fields: dict[str, Tensor]) -> None:
    for name, offset in matrix.offsets().items():
        raw = fields[name].contiguous().view(torch.uint8).numpy().tobytes()
        buffer[offset : offset + len(raw)] = raw


def _encode(piece: Piece, num_rows: int) -> dict[str, Tensor]:
    """The fields of a piece, padded to `num_rows` rows (the last block of a row table). Codes are
    kept where the foreign type has the encoding's codes."""
    if piece.encoding in ("int4", "group4", "group5", "group8"):
        found = [read_codes(part.tensor, piece.encoding) for part in piece.parts]
        codes = [c for c in found if c is not None]
        if len(codes) == len(piece.parts):
            code, step, low = (
                _stack(
                    [
                        getattr(c, k)[p.first :: p.step]
                        for c, p in zip(codes, piece.parts, strict=True)
                    ],
                    piece.parts,
                    num_rows,
                )
                for k in ("code_NK", "step_NG", "low_NG")
            )
            if piece.encoding == "int4":
                return Int4().from_codes(code, step, low)
            return Group(int(piece.encoding[-1])).from_codes(code, step)
    floats = [_shifted(p).reshape(-1, piece.width) for p in piece.parts]
    return encoding(piece.encoding).encode(_stack(floats, piece.parts, num_rows))


def _shifted(part: Part) -> Floats:
    numbers = read_floats(part.tensor)
    numbers = numbers.T if part.transposed else numbers
    numbers = np.ascontiguousarray(numbers[part.first :: part.step])
    return numbers + np.float32(part.shift) if part.shift else numbers


def _stack(arrays: Sequence[object], parts: Sequence[Part], num_rows: int) -> Tensor:
    rows = [_interleave(np.asarray(a), p.head_dim) for a, p in zip(arrays, parts, strict=True)]
    whole = np.concatenate(rows) if len(rows) > 1 else rows[0]
    missing = num_rows - len(whole)
    return torch.from_numpy(np.pad(whole, ((0, missing), (0, 0))) if missing else whole.copy())


def _interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:  # type: ignore[type-arg]
    """Heads in halves (i, i + d/2) -> adjacent pairs (2i, 2i + 1); a vector's one row likewise."""
    if not head_dim:
        return rows
    vector = len(rows) == 1
    heads = (rows.T if vector else rows).reshape(
        -1, 2, head_dim // 2, 1 if vector else rows.shape[1]
    )
    mixed = heads.swapaxes(1, 2).reshape(-1, heads.shape[-1])
    return np.ascontiguousarray(mixed.T if vector else mixed)
