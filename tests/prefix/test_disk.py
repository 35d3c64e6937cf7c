"""Blocks on disk against a plain model of what they must do: nothing that was committed is lost, nothing half
made or changed is loaded, whatever crashes, whoever else is there, however full the disk is."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outsize.kernels.plain import PLAIN
from outsize.prefix import disk as disks
from outsize.prefix import folder as folders
from outsize.prefix.disk import DiskBlocks, Shape, Traffic
from outsize.prefix.file import SUFFIX
from outsize.prefix.memory import MemoryBlocks

SHAPE = Shape((2, 4, 8, 16), torch.bfloat16)
SIZE = 4096 + 4096  # of a block's file
ROOT = Path(__file__).parents[2]


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def block(number: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(number)
    return torch.randn(SHAPE.sizes, generator=made).to(SHAPE.dtype)


def opened(folder: Path, most: int = 1 << 30, daily: int = 1 << 30) -> DiskBlocks:
    folder.mkdir(exist_ok=True)
    return DiskBlocks(folder, most, daily, True)


def found(blocks: DiskBlocks, numbers: Sequence[int]) -> list[torch.Tensor]:
    traffic = Traffic()
    made = [b.clone() for b in blocks.read([key(n) for n in numbers], SHAPE, PLAIN, traffic)]
    assert traffic.read == len(made) * SHAPE.nbytes
    return made


def path_of(folder: Path, number: int) -> Path:
    return folder / f"{key(number).hex()}{SUFFIX}"


def put(blocks: DiskBlocks, *numbers: int) -> Traffic:
    traffic = Traffic()
    for number in numbers:
        blocks.put(key(number), 0, block(number), traffic)
    blocks.flush()
    return traffic


class Cache(RuleBasedStateMachine):
    """Any order of operations on blocks of one folder, in memory and on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.most = 6  # files
        self.disk, self.memory = self.open(), MemoryBlocks(8)
        self.there: list[int] = []  # the least recently used first
        self.sizes: dict[int, int] = {}
        self.damaged = set[int]()
        self.clock = 1_000_000.0

    def open(self) -> DiskBlocks:
        return opened(self.folder, self.most * SIZE)

    def teardown(self) -> None:
        self.disk.close()
        shutil.rmtree(self.folder)

    def stamp(self, *numbers: int) -> None:
        """A clock that moves: real ones stand still between two operations."""
        for number in numbers:
            self.clock += 1
            os.utime(path_of(self.folder, number), (self.clock, self.clock))

    @rule(number=st.integers(0, 9))
    def add(self, number: int) -> None:
        written = put(self.disk, number).written
        if number in self.there:
            assert not written
            return
        assert written == SIZE
        while self.there and sum(self.sizes[n] for n in self.there) + SIZE > self.most * SIZE:
            self.damaged.discard(self.there.pop(0))
        self.there.append(number)
        self.sizes[number] = SIZE
        self.stamp(number)

    @rule(number=st.integers(0, 9))
    def hit(self, number: int) -> None:
        (got,) = found(self.disk, [number]) or [None]
        assert (got is not None) == (number in self.there and number not in self.damaged)
        if got is not None:
            assert torch.equal(got, block(number))
            self.disk.touch([key(number)])
            self.there.remove(number)
            self.there.append(number)
            self.stamp(number)
        elif number in self.damaged:  # it was removed
            self.there.remove(number)
            self.damaged.remove(number)

    @precondition(lambda self: set(self.there) - self.damaged)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(set(self.there) - self.damaged)))
        path = path_of(self.folder, number)
        kept = path.stat().st_mtime
        raw = bytearray(path.read_bytes())
        how = data.draw(st.sampled_from(["bit", "short", "empty", "foreign"]))
        if how == "bit":
            at = data.draw(st.sampled_from([0, 100, 2047, 4096, 4100, 4130, 4150]))
            raw[at] ^= 16
        elif how == "foreign":
            raw = bytearray(os.urandom(len(raw)))
        path.write_bytes(
            bytes(raw[: len(raw) // 2] if how == "short" else raw if how != "empty" else b"")
        )
        os.utime(path, (kept, kept))
        self.damaged.add(number)
        self.sizes[number] = path.stat().st_size

    @rule()
    def crash(self) -> None:
        """What a killed process leaves: a part; and another process opens the folder."""
        part = self.folder / f"{key(11).hex()}.1-0{folders.PART}"
        part.write_bytes(b"half")
        os.utime(part, (1, 1))
        self.disk.close()
        self.disk = self.open()
        folders.sweep(self.folder)
        assert not part.exists()

    @rule(most=st.integers(1, 6))
    def resize(self, most: int) -> None:
        """A smaller limit holds from the next block on."""
        self.disk.close()
        self.most, self.disk = most, opened(self.folder, most * SIZE)

    @rule(number=st.integers(0, 9))
    def remember(self, number: int) -> None:
        self.memory.put(key(number), block(number))
        self.memory.touch([key(number)])

    @rule()
    def forget(self) -> None:
        before = len(self.memory)
        assert self.memory.forget() == (before > 0)
        assert len(self.memory) == max(0, before - 1)

    @invariant()
    def same(self) -> None:
        names = {name for name, _, _ in folders.blocks(self.folder)}
        assert names == {path_of(self.folder, n).name for n in self.there}
        for n in range(10):
            kept = self.memory.get(key(n))
            assert kept is None or torch.equal(kept, block(n))


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


def test_a_gap_ends_what_is_read(tmp_path: Path) -> None:
    blocks = opened(tmp_path / "x")
    put(blocks, 1, 2, 4)
    assert len(found(blocks, [1, 2, 3, 4])) == 2
    assert found(blocks, [3]) == found(blocks, []) == []
    blocks.close()


def test_a_prompts_first_blocks_stay_longest(tmp_path: Path) -> None:
    """They are written first, and what comes after them is of no use without."""
    blocks = opened(tmp_path / "x", most=4 * SIZE)
    prompt = Traffic()
    for number in range(4):
        blocks.put(key(number), number, block(number), prompt)
    blocks.flush()
    put(blocks, 8, 9)
    assert len(found(blocks, [0, 1, 2, 3])) == 2
    assert blocks.fitting(SHAPE.nbytes) == 4
    blocks.close()


def test_what_a_file_is_of_is_checked(tmp_path: Path) -> None:
    """One block's file under another's name; and one of another shape."""
    blocks = opened(tmp_path / "x")
    put(blocks, 1)
    path_of(tmp_path / "x", 1).rename(path_of(tmp_path / "x", 2))
    assert found(blocks, [2]) == []
    put(blocks, 3)
    small = Shape((2, 4, 8, 8), torch.bfloat16)
    assert list(blocks.read([key(3)], small, PLAIN, Traffic())) == []
    blocks.close()


def test_the_day_has_its_share_of_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    blocks = opened(tmp_path / "x", daily=3 * SIZE)
    assert put(blocks, 1, 2, 3, 4, 5).written == 3 * SIZE
    assert folders.written_today(tmp_path / "x") == 3 * SIZE
    assert len(said) == 1, "it is said once"
    assert "were written today" in said[0]
    assert "(writes=SIZE)" in said[0]
    monkeypatch.setattr(folders, "_today", lambda: "2031-01-01")
    assert put(blocks, 6).written == SIZE
    blocks.close()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    out: list[str] = []
    monkeypatch.setattr(disks, "warn", out.append)
    return out


def test_one_that_is_larger_than_all_may_be(tmp_path: Path, said: list[str]) -> None:
    blocks = opened(tmp_path / "x", most=SIZE - 1)
    assert put(blocks, 1).written == 0
    assert "at most" in said[0]
    blocks.close()


@pytest.mark.parametrize(
    ("error", "text"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot be written")]
)
def test_a_disk_that_takes_nothing(
    error: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """What is there is still found; an answer never fails for it."""
    blocks = opened(tmp_path / "x")
    put(blocks, 1)

    def refuse(part: Path, *_: object) -> None:
        part.write_bytes(b"some")
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(disks, "write", refuse)
    assert put(blocks, 2, 3).written == 0
    assert len(said) == 1
    assert text in said[0]
    assert torch.equal(found(blocks, [1])[0], block(1))
    assert sorted(p.suffix for p in (tmp_path / "x").glob("*.[pr]*")) == [SUFFIX]
    blocks.close()


KILLED = """
import sys, torch
from pathlib import Path
from tests.prefix.test_disk import block, key, opened
from outsize.prefix.disk import Traffic
blocks = opened(Path(sys.argv[1]))
print("ready", flush=True)
for number in range(100000):
    blocks.put(key(number), 0, block(number % 50), Traffic())
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Twenty times: each file that has its name is whole, and what was there before is there still."""
    draw, committed = random.Random(4), set[str]()
    there = tmp_path / "x"
    for _ in range(20):
        run = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(there)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        time.sleep(draw.random() * 0.5)
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
        names = {name for name, _, _ in folders.blocks(there)}
        assert committed <= names
        committed = names
        blocks = opened(there)
        for name in list(names)[:200]:
            number = int.from_bytes(bytes.fromhex(name.removesuffix(SUFFIX)), "little")
            (got,) = found(blocks, [number])
            assert torch.equal(got, block(number % 50))
        blocks.close()
    assert len(committed) > 50


BOTH = """
import sys
from pathlib import Path
from tests.prefix.test_disk import SIZE, block, found, opened, put
import torch
blocks = opened(Path(sys.argv[1]), most=20 * SIZE)
for number in range(60):
    put(blocks, number)
    for got in found(blocks, [number]):
        assert torch.equal(got, block(number))
blocks.close()
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    """They write, evict and read in one folder; its size is kept, and each block is the right one."""
    runs = [
        subprocess.Popen([sys.executable, "-c", BOTH, str(tmp_path / "x")], cwd=ROOT)
        for _ in range(2)
    ]
    assert [run.wait() for run in runs] == [0, 0]
    sizes = [size for _, size, _ in folders.blocks(tmp_path / "x")]
    assert sum(sizes) <= 21 * SIZE, "one may be written while the other makes room"
    assert folders.written_today(tmp_path / "x") >= 60 * SIZE


def test_read_only(tmp_path: Path) -> None:
    put(opened(tmp_path / "x"), 1)
    blocks = DiskBlocks(tmp_path / "x", 1 << 30, 1 << 30, is_writable=False)
    assert put(blocks, 2).written == 0
    assert torch.equal(found(blocks, [1])[0], block(1))


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    put(opened(tmp_path / "x"), 1)
    assert path_of(tmp_path / "x", 1).stat().st_mode & 0o077 == 0
