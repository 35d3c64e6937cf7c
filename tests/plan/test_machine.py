"""What is kept of this machine: the best of several measurements, whatever else ran meanwhile."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import outsize
from outsize.engine import learn
from outsize.options import LoadOptions
from outsize.pack.outline import of_pack
from outsize.plan import cores, cost, machine, probe
from outsize.plan import make as planning
from outsize.plan.machine import Compute, Machine, Measurement
from outsize.report import doctor
from outsize.storage.reader import THREADS
from outsize.storage.tickets import PIECE

DISK = [(128 << 10, 1, 5e8), (PIECE, THREADS, 2e9)]
QUIET = Measurement(1.0, "", 40e9, 800e9, 100e9, DISK)


@pytest.fixture
def busy() -> Iterator[None]:
    """Two processes that never rest."""
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    loops = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for loop in loops:
        assert loop.stdout is not None
        loop.stdout.readline()
    yield
    for loop in loops:
        loop.kill()
        loop.communicate()


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.3) -> None:
    """Measuring yields a tenth of what is true."""
    monkeypatch.setattr(probe, "memory_bandwidth", lambda _: time.sleep(seconds) or 4e9)
    monkeypatch.setattr(probe, "matmul_speed", lambda *_: 70e9)
    disk = [(size, n, rate / 10) for size, n, rate in DISK]
    monkeypatch.setattr(probe, "disk_curve", lambda *_: disk)


@pytest.mark.skipif(not cores.STAT.is_file(), reason="this system does not tell of others")
@pytest.mark.usefixtures("busy")
def test_a_measurement_beside_busy_processes_lowers_nothing_and_says_so(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.keep(Machine(machine.name(), (QUIET,), {}), own_home)
    slow(monkeypatch)
    print("\n".join(doctor.lines(doctor.examine())))
    shown = capsys.readouterr().out
    assert "the machine was busy while it was measured (other processes took" in shown
    assert "best of 2 measurements" in shown
    found = machine.kept(own_home)
    assert found is not None
    assert (found.memory_bytes_per_s, found.bf16_flops, found.disk_bytes_per_s) == (
        40e9,
        800e9,
        2e9,
    )


def test_the_last_measurements_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that became slower is believed after a while."""
    slow(monkeypatch, 0.0)
    machine.keep(Machine(machine.name(), (QUIET,), {"m": Compute({}, {}, 1)}), tmp_path)
    seen = [machine.measured(tmp_path).memory_bytes_per_s for _ in range(machine.MOST)]
    assert seen == [40e9] * (machine.MOST - 1) + [4e9]
    found = machine.kept(tmp_path)
    assert found is not None
    assert found.models


@pytest.mark.parametrize("change", ["processor", "threads", "version"])
def test_another_machine_is_measured_for_itself(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines may share a home: neither believes the other, nor loses its own."""
    before = machine.name()
    machine.keep(Machine(before, (QUIET,), {}), tmp_path)
    assert machine.kept(tmp_path) is not None
    with monkeypatch.context() as patch:
        if change == "processor":
            patch.setattr(probe, "processor", lambda: "another")
        elif change == "threads":
            patch.setattr(machine.torch, "get_num_threads", lambda: 77)
        else:
            patch.setattr(machine, "__version__", "0")
        assert machine.kept(tmp_path) is None
        if change != "version":
            machine.keep(Machine(machine.name(), (QUIET,), {}), tmp_path)
    found = machine.kept(tmp_path)
    assert found is not None
    assert found.name == before


@pytest.mark.parametrize(
    "text", ["{broken", "[]", '{"machines": 3}', '{"machines": {"NAME": {"measurements": []}}}',
             '{"machines": {"NAME": {"measurements": [{"disk": [1]}], "models": {}, "version": "0.1.0"}}}']
)  # fmt: skip
def test_a_damaged_file_is_measured_again(text: str, tmp_path: Path) -> None:
    (tmp_path / machine.FILE).write_text(text.replace("NAME", machine.name()))
    assert machine.kept(tmp_path) is None
    machine.keep(Machine(machine.name(), (QUIET,), {}), tmp_path)
    assert machine.kept(tmp_path) is not None


def test_load_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat, average = tmp_path / "stat", tmp_path / "loadavg"
    monkeypatch.setattr(cores, "STAT", stat)
    monkeypatch.setattr(cores, "AVERAGE", average)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 2)

    def seen(user: int, steal: int, waiting: int, repeats: tuple[float, float]) -> str:
        stat.write_text("cpu 9 9\ncpu0 0 0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\ncpu7 1 1\n")
        average.write_text(f"0.1 0.1 0.1 {waiting}/100 7\n")
        with cores.Watch() as watch:
            time.sleep(0.05)
            stat.write_text(
                f"cpu 9 9\ncpu0 {user} 0 0 99 0 0 0 {steal} 0 0\ncpu1 0 0 0 9 0 0 0 0 0 0\ncpu7 900 9\n"
            )
        watch.compare(*repeats)
        return watch.reason

    assert seen(0, 0, 1, (1.0, 1.1)) == ""
    assert "other processes took" in seen(50, 0, 1, (1.0, 1.0))
    assert "the host took" in seen(0, 50, 1, (1.0, 1.0))
    assert "threads were waiting" in seen(0, 0, 4, (1.0, 1.0))
    assert "differ 3.0 times" in seen(0, 0, 1, (1.0, 3.0))
    stat.unlink()
    average.unlink()
    with cores.Watch() as watch:
        pass
    assert watch.reason == ""


def test_the_best_of_many_repeats_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine of ten are disturbed."""
    now, turns, watch = 0.0, iter(range(1000)), cores.Watch()

    def work() -> None:
        nonlocal now
        now += 0.001 if next(turns) % 10 == 3 else 0.01

    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(probe, "PATIENCE_S", 0.0)
    monkeypatch.setattr(probe, "LEAST_REPEATS", 20)
    assert probe.best_s(work, watch) == pytest.approx(0.001)
    assert "repeats of the same work differ" in watch.reason


def test_times_beside_others_replace_no_better_ones() -> None:
    kept, now = (
        Compute({"a": 1.0, "b": 5.0}, {"a": 2.0}, 8),
        Compute({"a": 9.0, "b": 4.0}, {"a": 1.0}, 8),
    )
    assert kept.or_faster(now) == Compute({"a": 1.0, "b": 4.0}, {"a": 1.0}, 8)
    assert kept.or_faster(replace(now, chunk_tokens=9)).chunk_tokens == 9


def test_runs_correct_the_plan(
    folder_of: Callable[[str], Path], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run reached can be reached: bandwidth, a token's time, the disk's rate."""
    with outsize.load(str(folder_of("llama")), quiet=True, draft="none") as model:
        (reply,) = model.generate("abc", raw=True, max_tokens=8)
        planning.make(str(folder_of("llama")), LoadOptions(memory="2GB", quiet=True), 8)
        known = machine.kept(home)
        assert known is not None
        (key,) = {k for k in known.models if k.startswith(cost.key(of_pack(model.pack)))}
        wrong = replace(QUIET, memory_bytes_per_s=1.0, disk=[(PIECE, THREADS, 1.0)])
        late = {
            key: replace(known.models[key], step_s=dict.fromkeys(known.models[key].step_s, 99.0))
        }
        shutil.copytree(home / "native", tmp_path / "native")
        monkeypatch.setenv("OUTSIZE_HOME", str(tmp_path))
        learn.learn(model, reply)
        assert not (tmp_path / machine.FILE).exists()
        machine.keep(Machine(machine.name(), (wrong,), late), tmp_path)
        learn.learn(model, replace(reply, disk_bytes_per_s=123_456))
        found = machine.kept(tmp_path)
        assert found is not None
        assert found.disk_bytes_per_s == 123_456
        assert found.memory_bytes_per_s == pytest.approx(
            sum(t.size for t in model.pack.tables if t.name != "embed") / reply.step_s
        )
        assert sum(found.models[key].step_s.values()) < 99.0
        before = (tmp_path / machine.FILE).stat().st_mtime_ns
        learn.learn(model, replace(reply, disk_bytes_per_s=5, step_s=1e3))
        assert (tmp_path / machine.FILE).stat().st_mtime_ns == before
    json.loads((tmp_path / machine.FILE).read_text())
