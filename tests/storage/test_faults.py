"""Disks that fail: a retry where a retry is right, else an error that names file, record and offset;
never a wrong number, never a hang."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from outsize.engine import conversation
from outsize.engine.model import Model
from outsize.errors import PackError, ReadError
from outsize.kernels.backend import Backend
from outsize.kernels.find import native_in
from outsize.kernels.plain import PLAIN
from outsize.options import Options
from outsize.report.reply_text import summary
from outsize.storage import file as medium
from outsize.storage import table as tables
from outsize.storage.buffers import buffer
from outsize.storage.reader import Reader
from outsize.storage.table import Table
from outsize.weights.residency import Share
from outsize.weights.scan import ScanCache
from tests.records import STRIDE, Faulty, open_table, write_table

COUNT = 4
Fetch = Callable[[int], torch.Tensor]


def expected(folder: Path, index: int) -> bytes:
    return (folder / "t.records").read_bytes()[index * STRIDE : (index + 1) * STRIDE]


def read(table: Table, index: int) -> bytes:
    raw, out = buffer(STRIDE)
    table.read(index, out)
    return raw.numpy().tobytes()


def scan(table: Table, turns: int = 1, backend: Backend = PLAIN) -> list[bytes]:
    """All records, in turn, through a ring of two, with reads ahead."""
    with Reader(backend=backend) as reader:
        cached = ScanCache(table, reader, Share((), 2))
        out = []
        for i in list(range(COUNT)) * turns:
            (weights,) = cached.fetch([i])
            out.append(weights["w"][0].fields["w"].numpy().tobytes())
            cached.release()
        return out


def test_short_reads(tmp_path: Path) -> None:
    table = open_table(tmp_path, write_table(tmp_path, COUNT), short=1000)
    assert scan(table) == [expected(tmp_path, i) for i in range(COUNT)]


def test_an_error_once_is_tried_again(tmp_path: Path) -> None:
    table = open_table(tmp_path, write_table(tmp_path, COUNT), errors=1)
    assert scan(table) == [expected(tmp_path, i) for i in range(COUNT)]


def test_an_error_always(tmp_path: Path) -> None:
    table = open_table(tmp_path, write_table(tmp_path, COUNT), errors=10**9, after=3)
    with pytest.raises(ReadError) as e:
        scan(table, turns=3)
    assert str(tmp_path / "t.records") in str(e.value)
    assert "cannot read record" in str(e.value)
    assert "at byte" in str(e.value)
    assert "4 times; check the disk" in str(e.value)


def test_after_an_error_the_record_is_read_anew(tmp_path: Path) -> None:
    """A slot whose read failed never passes for filled."""
    table = open_table(tmp_path, write_table(tmp_path, COUNT), errors=4, after=1)
    with Reader() as reader:
        cached = ScanCache(table, reader, Share((), 2), ())
        cached.fetch([0])
        with pytest.raises(ReadError):
            cached.fetch([2])
        for i in (2, 3):
            (weights,) = cached.fetch([i])
            assert weights["w"][0].fields["w"].numpy().tobytes() == expected(tmp_path, i)
            cached.release()


def test_a_bit_flipped_on_the_way_is_read_again(tmp_path: Path) -> None:
    table = open_table(tmp_path, write_table(tmp_path, COUNT), flips=1)
    assert scan(table) == [expected(tmp_path, i) for i in range(COUNT)]


@pytest.mark.parametrize("verify", ["first", "always"])
def test_a_bit_flipped_on_the_disk(tmp_path: Path, verify: str, reading: Backend) -> None:
    header = write_table(tmp_path, COUNT)
    with open(tmp_path / header.file, "r+b") as f:
        f.seek(2 * STRIDE + 100)
        f.write(b"\xff")
    table = open_table(tmp_path, header, verify)
    with pytest.raises(PackError, match=rf"record 2 at byte {2 * STRIDE:,} of t.records does not"):
        scan(table, backend=reading)


def test_always_checks_later_reads_too(tmp_path: Path) -> None:
    header = write_table(tmp_path, COUNT)
    table = open_table(tmp_path, header, "always", flips=10**9, after=COUNT)
    with pytest.raises(PackError, match="does not match its checksum"):
        scan(table, turns=2)


def test_never_checks_nothing(tmp_path: Path) -> None:
    header = write_table(tmp_path, COUNT)
    table = open_table(tmp_path, header, "never", flips=1)
    assert scan(table) != [expected(tmp_path, i) for i in range(COUNT)]


def test_a_file_truncated_while_open(tmp_path: Path) -> None:
    header = write_table(tmp_path, COUNT)
    table = open_table(tmp_path, header)
    assert read(table, 3) == expected(tmp_path, 3)
    os.truncate(tmp_path / header.file, 3 * STRIDE + 4096)
    with pytest.raises(PackError, match=r"record 3 at byte .* ends 4,096 bytes early"):
        read(table, 3)


def test_a_file_truncated_between_reads(tmp_path: Path, reading: Backend) -> None:
    header = write_table(tmp_path, COUNT)
    table = open_table(tmp_path, header)
    scan(table, backend=reading)
    os.truncate(tmp_path / header.file, 3 * STRIDE + 4096)
    with pytest.raises(PackError, match=r"record 3 at byte .* ends 4,096 bytes early"):
        scan(table, backend=reading)


def test_a_file_written_to_while_open(tmp_path: Path, reading: Backend) -> None:
    """What was verified once is verified again when the file changes under us."""
    header = write_table(tmp_path, COUNT)
    table = open_table(tmp_path, header)
    scan(table, backend=reading)
    time.sleep(0.02)  # a file system's clock has steps
    with open(tmp_path / header.file, "r+b") as f:
        f.seek(STRIDE)
        f.write(os.urandom(64))
    with pytest.raises(PackError, match=r"record 1 .* does not match its checksum"):
        scan(table, backend=reading)


def test_a_file_replaced_while_open(tmp_path: Path, reading: Backend) -> None:
    """The open handle keeps the old bytes, and they are right."""
    header = write_table(tmp_path, COUNT)
    before = [expected(tmp_path, i) for i in range(COUNT)]
    table = open_table(tmp_path, header)
    (tmp_path / "new").write_bytes(os.urandom(COUNT * STRIDE))
    os.replace(tmp_path / "new", tmp_path / header.file)
    assert scan(table, turns=2, backend=reading) == before * 2


def test_a_slow_disk(tmp_path: Path) -> None:
    """One percent of a disk: slow, right, and over."""
    header = write_table(tmp_path, COUNT)
    table = open_table(tmp_path, header, bytes_per_s=1e6)
    started = time.perf_counter()
    assert scan(table) == [expected(tmp_path, i) for i in range(COUNT)]
    assert time.perf_counter() - started < 10


def test_a_conversation_goes_on_after_a_failed_turn(
    open_paged: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails in the middle of a pass leaves no half-computed past behind."""
    monkeypatch.setattr(medium.File, "handle", lambda self: None)  # read from Python
    model = open_paged("qwen3")
    options = Options(max_tokens=6, raw=False)
    plain = conversation.Conversation(model, options)
    wanted = "".join(plain.say("one two three"))
    talk = conversation.Conversation(model, options)
    count, original = 0, Table.read_part

    def failing(self: Table, index: int, out: memoryview, start: int) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise ReadError(f"cannot read record {index}")
        original(self, index, out, start)

    monkeypatch.setattr(tables.Table, "read_part", failing)
    with pytest.raises(ReadError):
        "".join(talk.say("one two three"))
    talk.reset()
    assert "".join(talk.say("one two three")) == wanted
    assert zlib.crc32(wanted.encode()) == zlib.crc32(talk.reply.text.encode())


def test_direct_reads_that_are_refused_at_reading(
    tmp_path: Path, reading: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FUSE and network mounts do: read through the page cache from then on, without tries in vain."""
    if sys.platform != "linux":
        pytest.skip("O_DIRECT is Linux's")
    table, plain, refused = open_table(tmp_path, write_table(tmp_path, COUNT)), os.preadv, 0
    if not table.is_direct:
        pytest.skip("no direct reads in this folder")

    def preadv(handle: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal refused
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            refused += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    rest = [expected(tmp_path, i) for i in range(COUNT)]
    assert read(table, 2) == rest[2]
    assert (refused, table.is_direct, table.handle()) == (1, False, None)
    assert scan(table, turns=2, backend=reading) == rest * 2
    assert refused == 1
    table.close()


def test_the_account_says_that_reads_are_cached(
    open_paged: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_paged("qwen3")
    assert "page cache" not in summary(model.generate("a", max_tokens=2)[0])
    monkeypatch.setattr(medium.File, "handle", lambda self: None)
    for table in model.transformer.loaded.tables:
        table._file.is_direct = False
    (reply,) = model.generate("a", max_tokens=2)
    assert reply.cached_reads
    assert summary(reply).count("refuses direct reads") == 1


def test_the_native_pool_gives_up_and_hurries(tmp_path: Path, home: Path) -> None:
    """What nobody has begun can be cancelled, and what was read ahead can overtake; each ends once."""
    found = native_in(home / "native")
    if found is None:
        pytest.skip("no C compiler here")
    table = open_table(tmp_path, write_table(tmp_path, COUNT))
    buffers = [buffer(STRIDE) for _ in range(400)]
    with Reader(1, found) as reader:
        tickets = [
            reader.submit(table, i % COUNT, out, urgent=False) for i, (_, out) in enumerate(buffers)
        ]
        assert tickets[-1].cancel()
        tickets[-2].promote()
        tickets[-2].wait()
        late = sum(not t.is_done for t in tickets)
        for t in tickets[:-1]:
            t.wait()
        assert late > 0, "it overtook some"
        assert not tickets[0].cancel()
    with pytest.raises(CancelledError):
        tickets[-1].wait()
    for i, (raw, _) in enumerate(buffers[:-1]):
        assert raw.numpy().tobytes() == expected(tmp_path, i % COUNT)
    assert table.stats.bytes_read == 399 * STRIDE


@given(data=st.binary(max_size=700))
@example(data=bytes(range(256)) * 9 + b"and some")  # many times 256 bytes, which are taken at once
def test_the_native_checksum(data: bytes, home: Path) -> None:
    found = native_in(home / "native")
    if found is None:
        pytest.skip("no C compiler here")
    checksum, held = found.library.checksum, ctypes.create_string_buffer(data, len(data) or 1)
    checksum.argtypes, checksum.restype = [ctypes.c_void_p, ctypes.c_long], ctypes.c_uint32
    assert checksum(ctypes.addressof(held), len(data)) == zlib.crc32(data)


def test_the_medium_reads_past_no_end(tmp_path: Path) -> None:
    header = write_table(tmp_path, 1)
    backend = Faulty(tmp_path / header.file)
    assert backend.read(buffer(4096)[1], STRIDE) == 0
    backend.close()
