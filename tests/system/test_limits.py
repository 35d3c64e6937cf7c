"""Limits that a container or a shell sets: processors, memory, address_space."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
import torch

from outsize.plan import probe
from outsize.system import address_space, cgroups
from outsize.system import memory as budget

MAX = 9_223_372_036_854_771_712  # what version 1 says for "none"
Fake = Callable[[str, Mapping[str, str]], None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Control groups out of files: what /proc/self/cgroup says, and files by name."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")

    def make(own: str, files: Mapping[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return make


V1 = "4:memory:/a/b\n3:cpu,cpuacct:/a/b\n1:name=systemd:/\n0::/x\n"
QUOTAS: list[tuple[str, dict[str, str], float | None]] = [
    ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
    ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
    ("0::/a/b\n", {"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "400000 100000\n"}, 1.0),
    ("0::/\n", {"cpu.max": "300000 100000\n"}, 3.0),
    ("0::/../../x\n", {"cpu.max": "200000 100000\n"}, 2.0),
    ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    ("0::/\n", {"cpu.max": "what\n"}, None),
    ("0::/\n", {"cpu.max": ""}, None),
    (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1\n", "cpu/a/b/cpu.cfs_period_us": "100000\n"}, None),
    (V1, {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "120000", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000"}, 1.2),
    (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000",
          "cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2.0),
    (V1, {"cpu/a/b/cpu.cfs_quota_us": "5", "cpu/a/b/cpu.cfs_period_us": "0"}, None),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(QUOTAS)))
def test_threads_follow_the_quota(number: int, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    own, files, share = QUOTAS[number]
    fake(own, files)
    assert cgroups.quota() == share
    monkeypatch.setattr(probe.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    wanted = 8 if share is None else max(1, round(share))
    assert probe.allowed() == wanted
    assert probe.cores() <= wanted
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    set_to: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    probe.set_threads(None)
    assert set_to == [wanted]
    probe.set_threads(5)
    assert set_to == [wanted, 5]
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    probe.set_threads(None)
    assert set_to == [wanted, 5]


def test_threads_follow_the_mask(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("", {})
    monkeypatch.setattr(probe.os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert (probe.allowed(), probe.cores()) == (1, 1)
    fake("0::/\n", {"cpu.max": "700000 100000\n"})
    assert probe.allowed() == 1


MEMORY: list[tuple[str, dict[str, str], int, int]] = [  # limit and bytes free
    ("0::/a/b\n", {"a/b/memory.max": "500000000", "a/b/memory.current": "400000000"}, 500, 100),
    ("0::/a/b\n", {"a/b/memory.max": "max", "a/b/memory.current": "1000000",
                   "a/memory.max": "300000000", "a/memory.current": "250000000"}, 300, 50),
    ("0::/a/b\n", {"a/b/memory.max": "500000000", "a/b/memory.current": "1000000",
                   "a/memory.max": "600000000", "a/memory.current": "590000000"}, 500, 10),
    ("0::/\n", {"memory.max": "max", "memory.high": "200000000", "memory.current": "50000000"}, 200, 150),
    ("0::/\n", {"memory.max": "300000000", "memory.high": "max", "memory.current": "50000000"}, 300, 250),
    ("0::/\n", {"memory.max": "300000000", "memory.current": "280000000",
                "memory.stat": "anon 5\ninactive_file 30000000\nactive_file 10000000\n"}, 300, 60),
    (V1, {"memory/a/b/memory.limit_in_bytes": str(MAX), "memory/a/b/memory.usage_in_bytes": "9000000",
          "memory/a/memory.limit_in_bytes": "400000000", "memory/a/memory.usage_in_bytes": "390000000",
          "memory/a/memory.stat": "total_inactive_file 20000000\n"}, 400, 30),
    ("4:memory:/docker/abc\n", {"memory/memory.limit_in_bytes": "400000000",
                                "memory/memory.usage_in_bytes": "100000000"}, 400, 300),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MEMORY)))
def test_auto_stays_below_every_limit_around_it(number: int, fake: Fake) -> None:
    own, files, limit, left = MEMORY[number]
    fake(own, files)
    assert budget.total() == limit * 1_000_000
    free = left * 1_000_000 + budget.resident()
    assert budget.free() == pytest.approx(free, abs=2e7)
    assert budget.parse("auto") == pytest.approx(0.9 * free, abs=2e7)
    assert budget.parse("50%") == limit * 500_000


@pytest.mark.parametrize("own", ["", "0::/\n", "broken:x:/\n", "7:memory:/gone\n"])
def test_no_group_is_no_limit(own: str, fake: Fake) -> None:
    fake(own, {})
    assert budget.total() == psutil.virtual_memory().total
    assert cgroups.quota() is None


def limited(kind: str, limit: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line under a limit of the shell, in bytes."""
    code = (
        f"import resource, sys; resource.setrlimit(resource.{kind}, ({limit}, {limit}));"
        "from outsize.cli import main as cli; sys.argv[0] = 'outsize'; cli.main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


unix = pytest.mark.skipif(sys.platform == "win32", reason="no such limits")


@unix
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_too_few_addresses_is_one_sentence(kind: str) -> None:
    """torch, loaded under 430 MB, ended the process with std::bad_alloc; threads could not start."""
    done = limited(kind, 150_000_000, "run", "hello")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ulimit -")
    assert "lets this process map 150 MB, which is too little" in done.stderr
    assert done.stderr.count("\n") == 1
    assert limited(kind, 150_000_000, "version").returncode == 0


@unix
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build maps many GB")
@pytest.mark.parametrize("limit", [750_000_000, 1_300_000_000])
def test_plans_keep_within_the_addresses_there_are(
    limit: int, folder_of: Callable[[str], Path]
) -> None:
    """OpenBLAS gave up in the middle of an answer."""
    done = limited("RLIMIT_AS", limit, "run", str(folder_of("llama")), "hi", "-n", "3", "--raw")
    if limit < 1_000_000_000:
        assert done.returncode == 2
        assert "; ulimit -v lets this process map 750 MB, of which" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in done.stderr
    else:
        assert done.returncode == 0, done.stderr


def test_a_budget_is_cut_to_the_addresses_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        address_space, "limits", lambda: [("ulimit -v", 3_000_000_000, 2_000_000_000)]
    )
    left = 800_000_000 + budget.resident()
    assert budget.parse("4GB") == pytest.approx(left, abs=2e7)
    assert budget.parse("100MB") == 100_000_000
    assert budget.free() <= left + 2e7
    assert "3,000 MB, of which 2,000 MB" in address_space.bounds()
    assert address_space.refusal(["outsize", "run"]) == ""
    assert "(MemoryError)" in address_space.refusal(["outsize", "run"], MemoryError())
