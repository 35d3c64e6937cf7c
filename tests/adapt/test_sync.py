"""`outsize adapt sync`: what is chosen, what its file says, and a run with it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import outsize
from outsize.adapt.sync.choose import (
    CORRECTED,
    DROPPED,
    Layer,
    Rises,
    Times,
    choose,
    cost_of,
    only,
    ways,
)
from outsize.adapt.sync.means import interval
from outsize.adapt.sync.run import SyncOptions, run
from outsize.cli.main import app
from outsize.errors import AdapterError, OptionError, UnsupportedError
from outsize.pack import fetch, sync_file
from outsize.parallel.points import parse_dropped
from outsize.parallel.slow import Link
from outsize.parallel.spec import parse_parallel
from tests.golden import tiny

FAMILY = "llama+wide"
TIMES = Times(Link(1e-4, 12.5e6), 25e-6, 512, 2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"abc {i} cab{i % 7} bca" * 6 for i in range(60)))
    return file


def cost(rises: Rises, chosen: list[Layer]) -> float:
    return sum(ways(rises, i)[way] for i, way in enumerate(chosen))


def test_the_fastest_choice_within_a_budget() -> None:
    """The knapsack finds what trying all finds."""
    bits = {("attention", 4): 0.004, ("ffn", 4): 0.006, ("attention", 8): 0.0, ("ffn", 8): 1e-5}
    rises = Rises([0.001, 0.02, 0.3], [0.002, 0.01, 0.2], bits)
    for most in (0.0, 0.001, 0.012, 0.025, 1.0):
        chosen = choose(rises, TIMES, most)
        assert cost(rises, chosen) <= most + 1e-12
        every = itertools.product(*(ways(rises, i).items() for i in range(3)))
        best = min(
            sum(TIMES.seconds(way) for way, _ in some)
            for some in every
            if sum(c for _, c in some) <= 0.98 * most
        )
        assert sum(map(TIMES.seconds, chosen)) <= best + 1e-9
    assert choose(rises, TIMES, 1.0) == [
        Layer(DROPPED, 16, 4), Layer(CORRECTED, 16, 4), Layer(CORRECTED, 16, 4)
    ]  # fmt: skip
    assert choose(Rises([-0.1], [0.1], {}), TIMES, 0.0) == [Layer(DROPPED)], "a gain costs nothing"


def test_layers_of_a_choice() -> None:
    """Taken back layer by layer, dearest first."""
    rises = Rises(
        [0.3, -0.01, 0.02], [0.4, 0.1, 0.01], {("ffn", 4): 0.002, ("attention", 4): 0.001}
    )
    chosen = [Layer(DROPPED, 16, 4), Layer(DROPPED), Layer(CORRECTED, 16, 4)]
    costs = [cost_of(rises, i, way) for i, way in enumerate(chosen)]
    assert costs == pytest.approx([0.302, -0.01, 0.012])
    assert cost_of(rises, 0, Layer("", 4, 4)) == pytest.approx(0.003)
    assert only(chosen, [1]) == [Layer(), Layer(DROPPED), Layer()]


def test_intervals() -> None:
    assert interval([0.1, 0.1]) == (0.1, 0.1)
    low, high = interval([0.0, 0.2, 0.1, 0.1])
    assert low == pytest.approx(0.1 - 2 * 0.0408248, abs=1e-6)
    assert high == pytest.approx(0.1 + 2 * 0.0408248, abs=1e-6)


@pytest.mark.slow
def test_a_file_and_a_run_with_it(
    folder_of: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, resumed, read, run by two processes; for no other pack and no other number of ranks."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    name, out = str(folder_of(FAMILY)), tmp_path / "m.sync.safetensors"
    given: dict[str, Any] = {
        "data": (text,), "output": out, "rank": 8, "tokens": 1500, "length": 64, "sweep": 2, "quiet": True,
    }  # fmt: skip
    made = run(SyncOptions(name, gate=50.0, **given))
    about = made.about
    assert about.dropped
    assert about.perplexity_before != about.perplexity
    assert (
        about.change_low
        <= 100 * (about.perplexity / about.perplexity_before - 1)
        <= about.change_high
    )
    assert about.wire < about.wire_before
    assert any("chosen" in line for line in made.table)
    pack = fetch.pack(name, quiet=True)
    file = sync_file.read(out, tiny.LAYERS, tiny.WIDTH)
    assert file.about == about
    sync_file.check(file, pack.source.identity, pack.source.layout, "x", 2)
    with pytest.raises(AdapterError, match="is for 2 ranks, and there are 3"):
        sync_file.check(file, pack.source.identity, pack.source.layout, "x", 3)
    with pytest.raises(AdapterError, match="is for another pack"):
        sync_file.check(file, "other", pack.source.layout, "x", 2)
    how: dict[str, Any] = {"ranks": 2, "memory": "1GB", "quiet": True}
    with outsize.load(name, parallel=f"tensor:sync={out}", **how) as model:
        first = model.generate("abc " * 20, max_tokens=8, raw=True)[0].text
        assert len(first) > 0
        sent = model.transformer.leader
        assert sent is not None
        before = sent.wire.sent
        model.score("abc " * 8)
        assert sent.wire.sent > before
    with outsize.load(name, parallel="tensor:drop=1", **how) as model:
        assert len(model.generate("abc " * 20, max_tokens=8, raw=True)[0].text) > 0


def test_damaged_files(tmp_path: Path) -> None:
    about = {
        "kind": sync_file.KIND, "version": 1, "identity": "a", "layout": "b", "key_ends": [1, 2],
        "dropped": [1], "bits": {"0.ffn": 4}, "corrected": [1], "rank": 2, "link": "x",
        "wire_before": 1.0, "wire": 0.5, "tokens": 10, "perplexity_before": 9.0, "perplexity": 9.1,
        "change_low": 0.0, "change_high": 2.0, "text": "t",
    }  # fmt: skip
    whole = {
        f"1.{rank}.{name}": torch.zeros(shape, dtype=torch.bfloat16)
        for rank in (0, 1)
        for name, shape in (("first", (17, 2)), ("second", (2, 8)))
    }

    def read(
        changes: dict[str, object], tensors: dict[str, torch.Tensor] = whole
    ) -> sync_file.SyncFile:
        path = tmp_path / "x.safetensors"
        save_file(tensors, path, {"outsize": json.dumps({**about, **changes})})
        return sync_file.read(path, 3, 8)

    assert read({}).about.world == 2
    for changes, problem in (
        ({"kind": "x"}, "says nothing of sums"),
        ({"version": 2}, "made by another outsize"),
        ({"dropped": [7]}, "layers that there are not"),
        ({"corrected": [0]}, "layers that there are not"),
        ({"key_ends": [2, 1]}, "key heads end at"),
        ({"bits": {"0.ffn": 7}}, "other than 4, 5, 6 or 8"),
        ({"bits": {"9.ffn": 4}}, "other than 4, 5, 6 or 8"),
        ({"rank": 0}, "of rank 0"),
        ({"rank": 3}, "is due"),
        ({"perplexity": -1.0}, "perplexities are none"),
        ({"dropped": "x"}, "is damaged"),
    ):
        with pytest.raises(AdapterError, match=problem):
            read(changes)
    with pytest.raises(AdapterError, match="is due"):
        read({}, {k: v for k, v in whole.items() if k != "1.1.first"})
    bad = {**whole, "1.0.first": torch.full((17, 2), float("nan"), dtype=torch.bfloat16)}
    with pytest.raises(AdapterError, match="not finite"):
        read({}, bad).corrections(0)


def test_specs() -> None:
    assert parse_dropped("3+7-9") == (3, 7, 8, 9)
    assert parse_dropped("auto") == ()
    spec = parse_parallel("tensor:drop=1-2")
    assert (spec.way.cut, spec.way.attention, spec.lossy) == ("sum", "heads", "parallel drop=1-2")
    assert parse_parallel(str(spec)) == spec
    assert parse_parallel("tensor:sync=a/b.safetensors").drop == "auto"
    assert parse_parallel("tensor:drop=3,bits=4").lossy == "parallel bits=4,drop=3"
    for bad, problem in (
        ("tensor:drop=x", "numbers of layers from 0 on"),
        ("tensor:drop=5-3", "numbers of layers from 0 on"),
        ("tensor:drop=1,attention=whole", "attention=whole has none"),
        ("tensor:drop=auto,bits=4", "says how many bits"),
        ("tensor:drop=1,sync=a", "says how many bits"),
        ("tensor:drop=1,cut=gather", "write cut=sum"),
        ("tensor:drop=", "drop is given once, as auto, or numbers"),
        ("relay:drop=1", "'drop' is not known"),
    ):
        with pytest.raises(OptionError, match=problem):
            parse_parallel(bad)


def test_what_cannot_be_is_refused(
    folder_of: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    name = str(folder_of(FAMILY))
    how: dict[str, Any] = {"ranks": 2, "memory": "1GB", "quiet": True}
    with pytest.raises(AdapterError, match=r"drop=auto takes what a file says of 2 ranks"):
        outsize.load(name, parallel="tensor:drop=auto", **how)
    with pytest.raises(UnsupportedError, match="layer 9 cannot be dropped: there are layers 0 to"):
        outsize.load(name, parallel="tensor:drop=9", **how)
    with pytest.raises(UnsupportedError, match="a norm follows it"):
        outsize.load(str(folder_of("gemma3+wide")), parallel="tensor:drop=1", **how)
    with pytest.raises(OptionError, match="one rank has nobody to wait for"):
        SyncOptions(name, (text,), ranks=1)
    with pytest.raises(UnsupportedError, match="a norm follows it"):
        run(SyncOptions(str(folder_of("gemma3+wide")), (text,), length=64, quiet=True))
    with pytest.raises(OptionError, match="there is no checkpoint"):
        run(
            SyncOptions(
                name, (text,), tmp_path / "no", tokens=1500, length=64, resume=True, quiet=True
            )
        )
    (tmp_path / "no.checkpoint").write_text("{}")
    with pytest.raises(OptionError, match="is of a run that has not ended; go on with --resume"):
        run(SyncOptions(name, (text,), tmp_path / "no", tokens=1500, length=64, quiet=True))
    ran = CliRunner().invoke(
        app, ["adapt", "sync", name, "--ranks", "2", "--link", "fast", "--data", str(text)]
    )
    assert ran.exit_code != 0
