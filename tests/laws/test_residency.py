"""The law of residencies: what is fetched is what a resident table holds, bit for bit, for any trace, any
policy, any capacity that holds the request; and every byte is counted once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outsize import registry
from outsize.caching import eviction
from outsize.caching.eviction.pin_and_ring import PinAndRing
from outsize.caching.policy import Hints, make
from outsize.errors import CapacityError
from outsize.kernels.backend import Backend
from outsize.kernels.plain import PLAIN
from outsize.storage.buffers import buffer
from outsize.storage.reader import Reader
from outsize.storage.table import Table
from outsize.weights.cached import Cached
from outsize.weights.residency import Resident
from outsize.weights.rows import RowTable, join
from tests.records import ROWS, STRIDE, open_table, write_table

COUNT = 9
Fixture = tuple[Table, Reader, Resident]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, reading: Backend) -> Iterator[Fixture]:
    folder = tmp_path_factory.mktemp("table")
    table = open_table(folder, write_table(folder, COUNT))
    with Reader(backend=reading) as reader:
        yield table, reader, Resident(table, reader, PLAIN, lambda _: None)
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
    depth = capacity - 2 if name == "pin_and_ring" else None
    cached = Cached(table, reader, PLAIN, capacity, make(name, capacity, hints), (), depth)
    before, asked = table.traffic.hits + table.traffic.misses, 0
    for ids, ahead, by_stream in trace:
        ids = list(dict.fromkeys(ids))
        asked += len(ids)
        if by_stream:
            found = dict(pair for some in cached.stream(ids) for pair in some)
            assert set(found) == set(ids)
        else:
            found = dict(zip(ids, cached.fetch(ids), strict=True))
        assert all(same(found[i], resident.fetch([i])[0]) for i in ids)
        cached.prefetch(ahead)  # may not touch what is held
        assert all(same(found[i], resident.fetch([i])[0]) for i in ids)
        cached.release()
    assert table.traffic.hits + table.traffic.misses - before == asked


def test_a_request_that_cannot_fit(made: Fixture) -> None:
    table, reader, _ = made
    cached = Cached(table, reader, PLAIN, 2, make("lru", 2, Hints()))
    with pytest.raises(CapacityError, match="3 records are wanted at once, there are slots for 2"):
        cached.fetch([1, 2, 3])
    assert len(cached.fetch([1, 2])) == 2


def test_a_scan_reads_ahead_and_wastes_nothing(tmp_path: Path, reading: Backend) -> None:
    table = open_table(tmp_path, write_table(tmp_path, COUNT))
    pinned, ring, turns = (0, 4), 2, 6
    scan = [i for i in range(COUNT) if i not in pinned]
    policy = PinAndRing(len(pinned) + ring, pinned)
    with Reader(backend=reading) as reader:
        cached = Cached(table, reader, PLAIN, len(pinned) + ring, policy, scan, ring)
        cached.load(pinned, lambda _: None)
        cached.start()
        for _ in range(turns):
            for i in scan:
                cached.fetch([i])
                cached.release()
    t = table.traffic
    table.close()
    assert (t.hits, t.misses) == (0, turns * len(scan))
    assert t.bytes_useful == turns * len(scan) * STRIDE, "all but the first were read ahead"
    assert (t.bytes_demanded, t.bytes_wasted) == (0, 0)
    assert t.bytes_read == (len(pinned) + turns * len(scan) + ring) * STRIDE


def test_a_lent_ring_is_right_whenever_it_goes(made: Fixture) -> None:
    """Slots come and go, with reads on their way into them; what is fetched stays right."""
    table, reader, resident = made
    cached = Cached(table, reader, PLAIN, 3, PinAndRing(3, [0]), range(1, COUNT), 2, lent=4)
    assert cached.lends
    cached.start()
    for turn in range(40):
        if turn % 3 == 0:
            cached.borrow()
            assert len(cached.slot_table.ahead) <= 6
        for i in range(COUNT)[: turn % COUNT + 1]:
            assert same(cached.fetch([i])[0], resident.fetch([i])[0])
            cached.release()
        if turn % 3 == 1:
            assert cached.give_back() == 4 * table.header.stride
            assert cached.give_back() == 0
            assert set(cached.slot_table.slot_of.values()) <= {0, 1, 2}


def test_unpinning_frees_and_stays_right(made: Fixture) -> None:
    table, reader, resident = made
    cached = Cached(table, reader, PLAIN, COUNT, PinAndRing(COUNT, range(COUNT)), (), 0)
    cached.load(range(COUNT), lambda _: None)
    assert cached.unpin(8) == 0, "its slot becomes the ring"
    assert cached.unpin(7) == STRIDE
    assert cached.unpin(6) == STRIDE
    for i in [6, 7, 8] * 3:
        assert same(cached.fetch([i])[0], resident.fetch([i])[0])
        cached.release()


@pytest.mark.parametrize("held", [0, 3, COUNT])
def test_rows(tmp_path: Path, held: int) -> None:
    """By id, few and many, and by blocks: as if all were in memory."""
    table = open_table(tmp_path, write_table(tmp_path, COUNT, "rows"))
    with Reader() as reader:
        whole = join(table, reader, PLAIN, COUNT, lambda _: None)
        assert whole is not None
        expected = whole.fields["w"]
        joined = join(table, reader, PLAIN, held, lambda _: None)
        rest = range(held, COUNT)
        cached = (
            Cached(table, reader, PLAIN, 2, PinAndRing(2, ()), rest, 2) if held < COUNT else None
        )
        rows = RowTable(table, reader, PLAIN, joined, cached)
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
        rows = RowTable(table, reader, PLAIN, None, None)
        rows.rows(torch.tensor([3]))
        before = table.traffic.bytes_read
        rows.rows(torch.tensor([3, 4]))
        assert table.traffic.bytes_read - before == 4096, "neighbours share a page, read once"
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
    assert count() == before
    table.close()
