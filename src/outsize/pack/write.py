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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from outsize.checkpoint import tokenizer as tokenizers
from outsize.checkpoint.checkpoint import Checkpoint, TokenizerSpec
from outsize.checkpoint.source import hash_files
from outsize.errors import CheckpointError, DiskFullError, PackError, SourceError
from outsize.family.find import further_recipe
from outsize.family.find import recipe as find_recipe
from outsize.model_config import Description
from outsize.pack import store, tokenizer_file
from outsize.pack.encode import encode, slices
from outsize.pack.folders import rename, safe, sync
from outsize.pack.format import HEADER, Pack, read_header, write_header
from outsize.pack.layout import fault, lossy_tensors, plan, refuse_biases, rounded_tensors
from outsize.pack.lock import locked
from outsize.pack.source import Source, file_stats, identity, layout_hash
from outsize.pack.tables import Matrix, TableHeader
from outsize.pack.tensors import Record, TablePlan
from outsize.progress import Progress

FURTHER = "+further"  # behind the encoding of a pack of such a layer
SLACK = 64 << 20  # bytes that a file system wants for itself


@dataclass(frozen=True, slots=True)
class PackOptions:
    """What to write: the source as its user named it, the encoding asked for, whether our kernels
    for grouped encodings run here, and the version that writes."""

    spec: str
    wanted: str
    grouped: bool
    version: str
    further: bool = False  # of its layer that predicts further tokens, in place of the model

    @property
    def encoding(self) -> str:
        """What a pack says that it was asked for."""
        return self.wanted + FURTHER * self.further


def write(
    checkpoint: Checkpoint,
    how: PackOptions,
    home: Path,
    progress: Progress,
    warn: Callable[[str], None],
    say: Callable[[str], None],
) -> Pack:
    """Pack a checkpoint into `home`, or find that another process did. Raises OutsizeError."""
    tokenizers.check(checkpoint.tokenizer)  # before anything is encoded
    recipe = further_recipe(checkpoint) if how.further else find_recipe(checkpoint)
    tables = plan(checkpoint, recipe, how.wanted, how.grouped)
    _check_plan(recipe.description, tables)
    lossy = lossy_tensors(tables)
    if lossy:
        warn(
            f"{len(lossy)} tensors (the first is {lossy[0]}) are Q2_K or Q3_K and are re-encoded "
            "as int4, which changes their numbers a little; a Q4_K_M file is kept exactly"
        )
    _warn_of_rounding(tables, warn)
    refuse_biases(checkpoint, tables)
    source = _source(checkpoint, how, tables, home, progress)
    stem = checkpoint.files[0].stem if checkpoint.format == "gguf" else Path(how.spec).name
    name = f"{safe(stem)}-{source.identity[:12]}-{how.encoding}"
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / f".{name}.lock") as is_alone:
        final = home / name
        if final.exists():
            with suppress(PackError):
                if _is_of(found := read_header(final), source):
                    return _again(found, source)
            shutil.rmtree(final)
        spec, d = checkpoint.tokenizer, recipe.description
        draft = Pack(
            path=final, source=source, description=d, tables=(), bos=_start(spec, d.vocab_size),
            eos=tuple(i for i in spec.eos if 0 <= i < d.vocab_size), add_bos=spec.add_bos, tokenizer_crc=0,
            special_tokens=spec.names, chat_templates=spec.templates, licence=checkpoint.licence,
            made_by=how.version,
        )  # fmt: skip
        twin = store.same_records(home, source)
        if twin is None:
            free, size = shutil.disk_usage(home).free, sum(t.header.size for t in tables)
            say(f"packing {size / 1e6:,.0f} MB into {final} ({free / 1e9:,.1f} GB free)")
        text = partial(_tokenizer, checkpoint)
        made = write_whole(draft, text, tables, progress, twin, is_alone)
    if twin is not None and _succeeds(source, twin.source):
        with suppress(SourceError):  # another process was first
            store.remove(home, twin.path.name)
    return made


def _warn_of_rounding(tables: Sequence[TablePlan], warn: Callable[[str], None]) -> None:
    if rounded := rounded_tensors(tables):
        name, kind, encoding = rounded[0]
        warn(
            f"{len(rounded)} quantized tensors are not kept exactly (the first, {name}, is {kind} and is "
            f"packed as {encoding}), which changes their numbers a little; --encoding fp32 keeps them"
        )


def _check_plan(d: Description, tables: Sequence[TablePlan]) -> None:
    """What is written is held to what is read."""
    if problem := fault(d, [t.header for t in tables]):
        raise PackError(f"this {d.family} model cannot be packed: {problem}")


def _start(text: TokenizerSpec, rows: int) -> int | None:
    """The token that texts begin with, if the embedding has a row for it. Raises CheckpointError."""
    if text.bos is None or 0 <= text.bos < rows:
        return text.bos
    if text.add_bos:
        raise CheckpointError(
            f"texts begin with token {text.bos:,}, and the embedding has {rows:,} rows; the checkpoint is "
            "damaged: fetch it again"
        )
    return None


def _succeeds(new: Source, old: Source) -> bool:
    """Is that the same model, packed the same way, as it was before?"""
    return (new.spec, new.encoding) == (old.spec, old.encoding)


def _source(
    checkpoint: Checkpoint,
    how: PackOptions,
    tables: Sequence[TablePlan],
    home: Path,
    progress: Progress,
) -> Source:
    stats, beside = file_stats(checkpoint.files), checkpoint.sidecars
    digest = store.known_hash(home, stats) or hash_files(checkpoint.files, progress)
    return Source(
        how.spec, digest, sum(size for _, size, _, _ in stats), stats, how.encoding,
        file_stats(beside), identity(digest, beside), layout_hash(tables),
    )  # fmt: skip


def _is_of(pack: Pack, source: Source) -> bool:
    """Has it all that decides an answer? A name has a part of the identity only."""
    made = pack.source
    return (made.sha256, made.identity, made.layout, made.encoding) == (
        source.sha256, source.identity, source.layout, source.encoding,
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


def _tokenizer(checkpoint: Checkpoint) -> bytes:
    return tokenizers.build(checkpoint.tokenizer).to_str().encode()


def write_whole(
    draft: Pack,
    tokenizer: Callable[[], bytes],
    tables: Sequence[TablePlan],
    progress: Progress,
    twin: Pack | None,
    is_alone: bool,
) -> Pack:
    """The pack, under its name, with this tokenizer.json; its records are those of `twin` if there is one.
    Where locks keep nobody out, others may be writing the same: they are left alone, and the first to end
    wins."""
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
        pack = _write_text(replace(draft, tables=headers), folder, tokenizer())
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


def _write_text(draft: Pack, folder: Path, text: bytes) -> Pack:
    """Tokenizer and header."""
    tokenizer_file.write(folder, text)
    pack = replace(draft, tokenizer_crc=zlib.crc32(text))
    write_header(pack, folder)
    return pack


def _write_tables(
    folder: Path, tables: Sequence[TablePlan], progress: Progress
) -> tuple[TableHeader, ...]:
    total, done, headers = sum(t.header.size for t in tables), 0, []
    for table in tables:
        tick = partial(_tick, progress, done, total)
        if table.linked is not None:
            store.link(table.linked, folder / table.header.file)
            headers.append(table.header)
        else:
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
            for first, count, some in slices(piece, matrix):
                _put(buffer, matrix, encode(some, count), first)
    f.write(buffer)
    return zlib.crc32(buffer)


def _put(buffer: bytearray, matrix: Matrix, fields: Mapping[str, Tensor], first: int) -> None:
    """Writes the fields of rows from `first` on where they belong."""
    specs = matrix.specs
    for name, offset in matrix.offsets().items():
        raw = fields[name].contiguous().view(torch.uint8).numpy()
        steps = len(fields[name]) if specs[name].row_axis == 0 else 1
        at = offset + first // specs[name].rows * (raw.nbytes // steps)
        buffer[at : at + raw.nbytes] = raw.tobytes()
