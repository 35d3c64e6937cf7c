"""How many threads compute while other programs are busy."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

import outsize
from outsize.engine.model import Model
from outsize.kernels import threads
from outsize.kernels.threads import Look, Threads, look

LOOP = "import time; print(flush=True)\nend = time.time() + 30\nwhile time.time() < end: pass"


class Machine:
    """Cores on which others use some, by turns of a clock that goes on at each look."""

    def __init__(self, others: Sequence[float], niced: bool = False, cores: int = 4) -> None:
        self._others, self._niced, self._cores = list(others), niced, cores
        self.threads: Threads | None = None
        self._now = Look(time.perf_counter() - 1e6, 0.0, 0.0)

    def look(self) -> Look:
        others = self._others.pop(0) if self._others else 0.0
        own = min(self.threads.count, self._cores) if self.threads else 0
        if self._niced:  # they run where we do not
            others = min(others, self._cores - own)
        c, o, a = self._now
        self._now = Look(c + 0.25, o + own * 0.25, a + (own + others) * 0.25)
        return self._now


def run(machine: Machine, steps: int, most: int = 4) -> list[int]:
    made = machine.threads = Threads(most, machine.look, cores=4)
    return [made.now() for _ in range(steps)]


@pytest.mark.parametrize(
    ("others", "count"), [(0.0, 4), (0.3, 4), (0.7, 3), (1.0, 3), (1.7, 2), (2.0, 2), (9.0, 1)]
)
def test_threads_are_the_cores_that_others_leave(others: float, count: int) -> None:
    assert run(Machine([0.0] + [others] * 9), 6)[1:] == [count] * 5


def test_threads_come_back_when_others_end() -> None:
    counts = run(Machine([0.0, 1.0, 1.0, 1.0, 0.0, 0.0]), 6)
    assert counts == [3, 3, 3, 4, 4, 4]


def test_programs_that_make_room_do_not_take_threads_for_good() -> None:
    """Niced ones fill what we leave, so beside few threads they look busy; all threads are tried again."""
    machine = Machine([0.0, 0.0] + [4.0] * 400, niced=True)
    counts = run(machine, 400)
    machine.threads = None
    assert counts[-200:].count(4) > 150


def test_a_busy_machine_is_tried_ever_more_rarely() -> None:
    counts = run(Machine([0.0] + [2.0] * 1000), 900)
    assert 3 <= counts.count(4) <= 20


def test_where_the_system_does_not_say_all_threads_compute(tmp_path: Path) -> None:
    assert look(tmp_path / "none") is None
    (tmp_path / "stat").write_text("cpu 1\ncpu0 x\n\n")
    assert look(tmp_path / "stat") is None
    made = Threads(3, lambda: None)
    assert [made.now() for _ in range(3)] == [3, 3, 3]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def busy() -> Iterator[None]:
    """Programs that keep all cores busy."""
    cores = len(os.sched_getaffinity(0))
    command = [sys.executable, "-c", LOOP]
    loops = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(cores)]
    try:
        for loop in loops:
            assert loop.stdout is not None
            loop.stdout.readline()
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.communicate()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="the system does not say who is busy")
def test_others_are_seen_and_answers_stay_the_same(
    open_tiny: Callable[..., Model], two_threads: None, busy: None
) -> None:
    """On the real machine: fewer threads beside busy programs, the same tokens, and torch's threads as
    they were."""
    model = open_tiny("llama", "auto")
    made = Threads(2)
    time.sleep(2 * threads.PERIOD)
    assert made.now() < made.most
    kept, model.transformer.threads = model.transformer.threads, made
    try:
        (fewer,) = model.generate("one two three", max_tokens=12, temperature=0)
        model.transformer.threads = Threads(2, lambda: None)
        (all_of_them,) = model.generate("one two three", max_tokens=12, temperature=0)
    finally:
        model.transformer.threads = kept
    assert str(fewer) == str(all_of_them)
    assert fewer.threads < all_of_them.threads == 2
    assert torch.get_num_threads() == 2


def test_a_number_of_threads_that_was_asked_for_is_kept(
    open_tiny: Callable[..., Model], two_threads: None
) -> None:
    model = open_tiny("llama", "auto")
    with outsize.load(str(model.pack.path), threads=1, quiet=True) as one:
        (reply,) = one.generate("one", max_tokens=4)
        assert reply.threads == 1.0


def test_a_thread_that_begins_beside_a_step_of_one_thread_has_all() -> None:
    """Torch tells it once how many there are: it kept one for ever, and ended steps by telling all others."""
    before, seen = torch.get_num_threads(), list[int]()
    torch.set_num_threads(2)
    made = Threads(2, lambda: None, alone=True)

    def other() -> None:
        seen.append(torch.get_num_threads())
        with made.narrow(True):
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    try:
        with made.narrow(True):
            assert torch.get_num_threads() == 1
            begun = threading.Thread(target=other)
            begun.start()
            begun.join()
        assert seen == [2, 1, 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
