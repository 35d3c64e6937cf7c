"""The law of residencies: what is fetched is what a resident table holds, bit for bit, for any trace, any
policy, any capacity that holds the request; and every byte is counted once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outsize import registry
from outsize.caching import eviction
from outsize.caching.policy import Hints, make
from outsize.errors import CapacityError, PackError
from outsize.kernels.backend import Backend
from outsize.storage.buffers import buffer
from outsize.storage.reader import Reader
from outsize.storage.table import Table, Weights
from outsize.storage.tickets import Ticket
from outsize.weights import residency
from outsize.weights.residency import Share
from outsize.weights.routed import RoutedCache
from outsize.weights.rows import RowTable, join
from outsize.weights.scan import ScanCache
from tests.records import ROWS, STRIDE, open_table, write_table

COUNT = 9
WHOLE = Share(tuple(range(COUNT)), 0)
Fixture = tuple[Table, Reader, dict[int, Weights]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, reading: Backend) -> Iterator[Fixture]:
    folder = tmp_path_factory.mktemp("table")
    table = open_table(folder, write_table(folder, COUNT))
    with Reader(backend=reading) as reader:
        yield table, reader, ScanCache(table, reader, WHOLE).load(range(COUNT), lambda _: None)
    table.close()


def same(ours: object, theirs: object) -> bool:
    one, two = ours["w"][0].fields["w"], theirs["w"][0].fields["w"]  # type: ignore[index]
    return torch.equal(one, two)


requests = st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=3)


@pytest.mark.parametrize("name", registry.names(eviction))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    trace=st.lists(st.tuples(requests, requests, st.booleans()), min_size=1, max_size=25),
    capacity=st.integers(5, COUNT),
)
def test_fetch(
    name: str, made: Fixture, trace: list[tuple[list[int], list[int], bool]], capacity: int
) -> None:
    table, reader, resident = made
    hints = Hints(pinned=(1, 4), future=[ids for ids, _, _ in trace])
    cached = RoutedCache(table, reader, partial(make, name, capacity, hints), capacity)
    before, asked = table.stats.hits + table.stats.misses, 0
    for ids, ahead, by_stream in trace:
        ids = list(dict.fromkeys(ids))
        asked += len(ids)
        if by_stream:
            found = dict(pair for some in cached.stream(ids) for pair in some)
            assert set(found) == set(ids)
        else:
            found = dict(zip(ids, cached.fetch(ids), strict=True))
        assert all(same(found[i], resident[i]) for i in ids)
        cached.prefetch(ahead)  # may not touch what is held
        assert all(same(found[i], resident[i]) for i in ids)
        cached.release()
    assert table.stats.hits + table.stats.misses - before == asked


def test_a_request_that_cannot_fit(made: Fixture) -> None:
    table, reader, _ = made
    cached = RoutedCache(table, reader, partial(make, "lru", 2, Hints()), 2)
    with pytest.raises(CapacityError, match="3 records are wanted at once, there are slots for 2"):
        cached.fetch([1, 2, 3])
    assert len(cached.fetch([1, 2])) == 2


def test_a_scan_reads_ahead_and_wastes_nothing(tmp_path: Path, reading: Backend) -> None:
    table = open_table(tmp_path, write_table(tmp_path, COUNT))
    pinned, ring, turns = (0, 4), 2, 6
    scan = [i for i in range(COUNT) if i not in pinned]
    with Reader(backend=reading) as reader:
        cached = ScanCache(table, reader, Share(pinned, ring))
        cached.load(pinned, lambda _: None)
        cached.start()
        for _ in range(turns):
            for i in scan:
                cached.fetch([i])
                cached.release()
    t = table.stats
    table.close()
    assert (t.hits, t.misses) == (0, turns * len(scan))
    assert t.bytes_useful == turns * len(scan) * STRIDE, "all but the first were read ahead"
    assert (t.bytes_demanded, t.bytes_wasted) == (0, 0)
    assert t.bytes_read == (len(pinned) + turns * len(scan) + ring) * STRIDE


def test_a_lent_ring_is_right_whenever_it_goes(made: Fixture) -> None:
    """Slots come and go, with reads on their way into them; what is fetched stays right."""
    table, reader, resident = made
    cached = ScanCache(table, reader, Share((0,), 2, lent=4))
    assert cached.lends
    cached.start()
    for turn in range(40):
        if turn % 3 == 0:
            cached.borrow_scratch()
            assert len(cached.slot_table.ahead) <= 6
        for i in range(COUNT)[: turn % COUNT + 1]:
            assert same(cached.fetch([i])[0], resident[i])
            cached.release()
        if turn % 3 == 1:
            assert cached.return_scratch() == 4 * table.header.stride
            assert cached.return_scratch() == 0
            assert set(cached.slot_table.slot_of.values()) <= {0, 1, 2}


def test_records_side_by_side_are_read_at_once(tmp_path: Path, reading: Backend) -> None:
    """In the file and in slots, by threads of C, once each was checked; counted one by one."""
    table = open_table(tmp_path, write_table(tmp_path, COUNT))
    with Reader(backend=reading) as reader:
        resident = ScanCache(table, reader, WHOLE).load(range(COUNT), lambda _: None)
        before, sizes = table.stats.bytes_read, []
        started = reader.submit_run

        def submit_run(*args: Any) -> Ticket | None:
            sizes.append(len(args[2]))
            return started(*args)

        reader.submit_run = submit_run  # type: ignore[method-assign]
        cached = RoutedCache(table, reader, partial(make, "static", 6, Hints()), 6)
        for ids in ([0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2], [4, 8]):
            assert all(map(same, cached.fetch(ids), [resident[i] for i in ids]))
            cached.release()
        assert sizes == [3 * STRIDE] * 2, "the slots were all used before"
        cached.prefetch([3, 5, 6])
        ahead = sorted(cached.slot_table.ahead)
        cached.cancel(ahead)
        assert all(map(same, cached.fetch(ahead), [resident[i] for i in ahead]))
    assert sum(table.bytes_of) == table.stats.bytes_read
    assert table.stats.bytes_read - before >= 15 * STRIDE
    table.close()


def test_a_run_that_fails_is_read_again(tmp_path: Path, reading: Backend) -> None:
    table = open_table(tmp_path, write_table(tmp_path, COUNT))
    with Reader(backend=reading) as reader:
        cached = RoutedCache(table, reader, partial(make, "static", 4, Hints()), 4)
        for ids in ([0, 1], [2, 3], [4, 5]):
            cached.fetch(ids)
            cached.release()
        os.truncate(tmp_path / "t.records", STRIDE)
        with pytest.raises(PackError, match="bytes early"):
            cached.fetch([0, 1])
    table.close()


def test_neighbours_in_the_file_are_read_at_once(tmp_path: Path, reading: Backend) -> None:
    """Into whatever slots are free: the bytes of single reads, each checked once, counted one by one; by one
    request, where threads of C read."""
    table = open_table(tmp_path, write_table(tmp_path, COUNT))
    with Reader(backend=reading) as reader:
        resident = ScanCache(table, reader, WHOLE).load(range(COUNT), lambda _: None)
    apart = open_table(tmp_path, table.header)
    with Reader(backend=reading) as reader:
        cached = RoutedCache(apart, reader, partial(make, "lru", 6, Hints()), 6, scatters=True)
        for ids, requests in (
            ([8, 2, 1, 0], 2), ([1, 3, 4, 5], 1), ([7, 8], 1), ([0, 1, 2, 4, 5, 6], 3), ([0, 6], 0),
        ):  # fmt: skip
            before = apart.stats.requests, apart.stats.misses
            assert all(map(same, cached.fetch(ids), [resident[i] for i in ids]))
            cached.release()
            missed = apart.stats.misses - before[1]
            assert apart.stats.requests - before[0] == (
                missed if reading.library is None else requests
            )
        assert all(map(apart.is_verified, range(COUNT)))
    assert sum(apart.bytes_of) == apart.stats.bytes_read == apart.stats.misses * STRIDE
    table.close()
    apart.close()


def test_no_request_is_larger_than_a_piece(
    tmp_path: Path, reading: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that whoever waits for the first of many need not wait for all."""
    monkeypatch.setattr(residency, "PIECE", 4 * STRIDE + 1)
    table = open_table(tmp_path, write_table(tmp_path, COUNT))
    with Reader(backend=reading) as reader:
        cached = RoutedCache(
            table, reader, partial(make, "lru", COUNT, Hints()), COUNT, scatters=True
        )
        cached.load(range(COUNT), lambda _: None)
    assert table.stats.requests == (COUNT if reading.library is None else 3)
    table.close()


@pytest.mark.parametrize("harm", ["flipped", "short"])
def test_one_bad_record_among_neighbours(tmp_path: Path, reading: Backend, harm: str) -> None:
    """It is named, and the others are there."""
    table = open_table(tmp_path, write_table(tmp_path, COUNT))
    with Reader(backend=reading) as reader:
        resident = ScanCache(table, reader, WHOLE).load(range(COUNT), lambda _: None)
        if harm == "short":
            os.truncate(tmp_path / "t.records", 7 * STRIDE + 9)
        else:
            with (tmp_path / "t.records").open("r+b") as f:
                f.seek(7 * STRIDE + 5)
                f.write(b"\xff\x00\xff")
        cached = RoutedCache(table, reader, partial(make, "lru", 6, Hints()), 6, scatters=True)
        for _ in range(2):
            with pytest.raises(PackError, match="record 7"):
                cached.fetch([5, 6, 7])
            cached.release()
        assert all(map(same, cached.fetch([5, 6]), [resident[i] for i in (5, 6)]))
    table.close()


def test_lent_slots_hold_what_is_used_most(made: Fixture) -> None:
    """They come and go, also what passed through the ring before, with reads on their way."""
    table, reader, resident = made
    hints = Hints(ranked=[5, 2, 7, 1, 0, 3, 4, 6, 8])
    cached = RoutedCache(table, reader, partial(make, "static", 4, hints), 4, lent=3)
    assert cached.lends
    for turn in range(12):
        cached.prefetch([5, 6])
        cached.borrow_scratch()
        for i in (5, 2, 7, 8, 0, 5):
            assert same(cached.fetch([i])[0], resident[i])
            cached.release()
        assert {5, 2, 7} <= cached.slot_table.slot_of.keys()
        hits = table.stats.hits
        cached.fetch([5, 2, 7])
        assert table.stats.hits == hits + 3
        cached.release()
        if turn % 3 == 0:
            cached.restore()
        else:
            assert cached.return_scratch() == 3 * STRIDE
        assert set(cached.slot_table.id_in) <= set(range(4))
        assert same(cached.fetch([7])[0], resident[7])
        cached.release()


def test_unpinning_frees_and_stays_right(made: Fixture) -> None:
    table, reader, resident = made
    cached = ScanCache(table, reader, WHOLE)
    cached.load(range(COUNT), lambda _: None)
    assert cached.unpin(8) == 0, "its slot becomes the ring"
    assert cached.unpin(7) == STRIDE
    assert cached.unpin(6) == STRIDE
    for i in [6, 7, 8] * 3:
        assert same(cached.fetch([i])[0], resident[i])
        cached.release()


@pytest.mark.parametrize("resident", [0, 3, COUNT])
def test_rows(tmp_path: Path, resident: int) -> None:
    """By id, few and many, and by blocks: as if all were in memory."""
    table = open_table(tmp_path, write_table(tmp_path, COUNT, "rows"))
    with Reader() as reader:
        whole = join(table, reader, COUNT, lambda _: None)
        assert whole is not None
        expected = whole.fields["w"]
        joined = join(table, reader, resident, lambda _: None)
        rest = range(resident, COUNT)
        cached = ScanCache(table, reader, Share((), 2), rest) if resident < COUNT else None
        rows = RowTable(table, reader, joined, cached)
        for ids in ([5], [0, 143, 70, 70], list(range(144)), [ROWS * 4 + 1, ROWS * 4 + 2]):
            for _ in range(2):  # the second time, records are known to be sound: parts are read
                assert torch.equal(rows.rows(torch.tensor(ids)), expected[ids])
        for _ in range(2):
            blocks = torch.cat([w.fields["w"].clone() for w in rows.blocks()])
            assert torch.equal(blocks, expected)
    table.close()


def test_reading_few_rows_reads_few_pages(tmp_path: Path) -> None:
    table = open_table(tmp_path, write_table(tmp_path, COUNT, "rows"))
    with Reader() as reader:
        rows = RowTable(table, reader, None, None)
        rows.rows(torch.tensor([3]))
        before = table.stats.bytes_read
        rows.rows(torch.tensor([3, 4]))
        assert table.stats.bytes_read - before == 4096, "neighbours share a page, read once"
    table.close()


def test_threads_end(tmp_path: Path, reading: Backend) -> None:
    def count() -> int:
        tasks = Path("/proc/self/task")
        return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()

    table = open_table(tmp_path, write_table(tmp_path, COUNT))
    _, out = buffer(STRIDE)
    before = count()
    reader = Reader(3, reading)
    reader.submit(table, 0, out).wait()
    assert count() == before + 3
    reader.close()
    until = (
        time.monotonic() + 10
    )  # the system's list may show a thread a moment longer than it lives
    while count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert count() == before
    table.close()
