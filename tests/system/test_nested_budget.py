"""Nested experts within a budget: the most that a process of its own had, at any width, as a drafter, with an
add-on; and under the kernel's own cap, page cache included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from outsize.adapt import checkpoints
from outsize.adapt.nested.cut import cut
from outsize.bench.synthetic import gguf, shapes
from outsize.model_config import Description
from outsize.pack import fetch, nested_file
from outsize.pack.format import Pack
from outsize.pack.nested_file import Member, NestedAbout
from outsize.progress import silent
from tests.system.test_real_budget import CHILD, MB

pytest.importorskip("gguf")
SIZE = shapes.Size(8, 768, 3072, 12, 4, 8_000, 1024)
COUNT, RANK = 4, 64
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
WAYS: list[dict[str, Any]] = [{}, {"width": 0.5}, {"draft": "nested:0.3:k=2"}]


@pytest.fixture(scope="module")
def pack(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """A synthetic model, cut, with an add-on whose corrections take memory."""
    path = tmp_path_factory.mktemp("synthetic") / "m.gguf"
    gguf.write(path, "llama", SIZE, 1)
    base = fetch.pack(str(path), quiet=True)
    d = base.description
    made = cut(base, COUNT, torch.arange(d.ffn_width).expand(d.num_layers, -1), silent)
    write_add_on(made, d)
    return made


def write_add_on(pack: Pack, d: Description) -> None:
    """Routers by chance."""
    g, widths = torch.Generator().manual_seed(0), tuple(range(1, COUNT + 1))
    family = tuple(Member(t, s, 30.0, 0.5, 0.6) for t, s in ((0.0, 0.25), (0.5, 0.5), (0.9, 0.8)))
    about = NestedAbout(
        nested_file.KIND, nested_file.VERSION, pack.source.identity, pack.source.layout, COUNT,
        widths, RANK, "agreement", 0.1, family, 20.0, 100, "a text", 100, 1.0, 0,
    )  # fmt: skip
    n, m = d.num_layers, COUNT
    tensors = {
        "router": torch.randn(n, m, d.width, generator=g) / 30,
        "bias": torch.zeros(n, m, dtype=torch.float32),
        "use": torch.ones(3, n, COUNT, dtype=torch.float32),
        "a": torch.randn(n, m - 1, RANK, d.width, generator=g) / 100,
        "b": torch.randn(n, m - 1, d.width, RANK, generator=g) / 100,
        "c": torch.zeros(n, m - 1, d.width, dtype=torch.float32),
    }
    checkpoints.save(nested_file.beside(pack), tensors, about.to_json())


def ran(pack: Pack, more: int, *prefix: str, **how: Any) -> dict[str, Any]:
    """What a process tells that runs with `more` bytes than the least."""
    told = {
        "model": str(pack.path),
        "more": more,
        "context": 256,
        "words": 60,
        "quiet": True,
        **how,
    }
    command = [*prefix, sys.executable, "-c", CHILD, json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("how", WAYS, ids=lambda how: "-".join(how) or "full")
@pytest.mark.parametrize("more", [8 * MB, 120 * MB])
def test_widths_keep_the_budget(pack: Pack, more: int, how: dict[str, Any]) -> None:
    found = ran(pack, more, **how)
    assert found["peak"] <= found["budget"]
    if more < 20 * MB:
        assert found["fixed"]["routers"] >= nested_file.of_pack(pack).size  # type: ignore[union-attr]


@contextmanager
def capped(size: int) -> Iterator[tuple[Path, Path]]:
    """A memory control group of this size: where a process joins it, and where it tells of kills."""
    if os.geteuid() != 0:
        pytest.skip("a memory control group can be made by root only")
    is_v1 = (V1 / "memory.limit_in_bytes").exists()
    folder = (V1 if is_v1 else V2) / f"outsize-test-{os.getpid()}"
    try:
        folder.mkdir()
        limit = folder / ("memory.limit_in_bytes" if is_v1 else "memory.max")
        limit.write_text(str(size))
    except OSError as e:
        pytest.skip(f"no memory control group can be made here: {e}")
    try:
        yield folder / "cgroup.procs", folder / ("memory.oom_control" if is_v1 else "memory.events")
    finally:
        folder.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("how", WAYS, ids=lambda how: "-".join(how) or "full")
def test_runs_under_the_kernels_cap(pack: Pack, how: dict[str, Any]) -> None:
    """Capped at the very budget, page cache and all: nothing is killed."""
    budget = ran(pack, 8 * MB, **how)["budget"]
    with capped(budget) as (procs, events):
        join = ("bash", "-c", f'echo $BASHPID > {procs}; exec "$@"', "-")
        found = ran(pack, 8 * MB, *join, **how)
        kills = [line for line in events.read_text().splitlines() if line.startswith("oom_kill ")]
    assert found["peak"] <= budget
    assert kills == ["oom_kill 0"]
