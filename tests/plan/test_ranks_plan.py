"""The plan of several ranks: who holds what, bytes and messages by formula, times by the link."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from outsize.cli.main import app
from outsize.engine.model import Model
from outsize.errors import OptionError
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.parallel.shard import outlined
from outsize.parallel.slow import Link, parse_link
from outsize.parallel.split import Ranks, Way, split
from outsize.plan import ranks
from outsize.plan.machine import Compute, Machine
from tests.golden import tiny
from tests.parallel.sharded import shards_of


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No measurement of the machine: a second or two."""
    here = Machine("", (), {})
    compute = Compute({"attn-0": 1e-3, "ffn-0": 3e-3, "head": 1e-3, "embed": 1e-3}, {}, 32)
    monkeypatch.setattr(ranks.machine, "known", lambda *_: here)
    monkeypatch.setattr(ranks, "computing", lambda *_: (here, compute))
    monkeypatch.setattr(Machine, "disk_bytes_per_s", 1e9)


def plan(name: str, link: str, **how: object) -> ranks.RanksPlan:
    options = LoadOptions(ranks=2, memory="4GB", quiet=True, **how)  # type: ignore[arg-type]
    return ranks.make(name, options, parse_link(link))


def test_links() -> None:
    assert parse_link("100Mbit/s") == Link(1e-4, 12.5e6)
    assert parse_link("1 Gbit/s, 0.2ms") == Link(2e-4, 125e6)
    for bad in ("100", "fast", "0Mbit/s", "1Gbit/s,2", "1Gbit/s,-1ms"):
        with pytest.raises(OptionError, match=r"RATE\[,LATENCY\] is expected"):
            parse_link(bad)


@pytest.mark.usefixtures("measured")
def test_a_plan_of_ranks(folder_of: Callable[[str], Path]) -> None:
    found = {w.name: w for w in plan(str(folder_of("llama+wide")), "1Gbit/s").ways}
    assert [w.refused for w in found.values()] == [""] * 4
    layers, width = tiny.LAYERS, tiny.WIDTH
    of = {name: (w.messages, w.sent) for name, w in found.items()}
    each = found["tensor:cut=gather,attention=whole"].ranks[0].shard
    assert of == {
        "tensor:cut=gather,attention=whole": (
            2 * layers, 2 * layers * (each.outer + each.neurons[1] - each.neurons[0]),
        ),
        "tensor:cut=sum,attention=whole": (layers, 2 * layers * width),
        "tensor:cut=sum,attention=heads": (2 * layers, 4 * layers * width),
        "relay": (1, 4 * width),
    }  # fmt: skip
    assert found["tensor:cut=sum,attention=whole"].wire_s == pytest.approx(
        layers * (25e-6 + 1e-4) + 2 * layers * width / 125e6
    )


@pytest.mark.usefixtures("measured")
def test_a_slow_link_chooses_another_way(folder_of: Callable[[str], Path]) -> None:
    name = str(folder_of("llama+wide"))
    fast, slow = plan(name, "10Gbit/s,0.01ms").best, plan(name, "1Mbit/s,20ms").best
    assert fast is not None
    assert slow is not None
    assert (fast.way.cut, slow.way.cut) == ("sum", "layers")


@pytest.mark.usefixtures("measured")
def test_what_cannot_be_shared_out_says_so(folder_of: Callable[[str], Path]) -> None:
    found = {w.name: w.refused for w in plan(str(folder_of("olmoe")), "1Gbit/s").ways}
    assert not found.pop("relay")
    assert not found.pop("experts")
    assert all("is a mixture of experts" in refused for refused in found.values())


@pytest.mark.usefixtures("measured")
def test_ranks_that_have_all_of_it(folder_of: Callable[[str], Path]) -> None:
    (way,) = plan(str(folder_of("llama+wide")), "1Gbit/s", parallel="runahead").ways
    assert (way.name, way.messages, way.sent, way.wire_s) == ("runahead", 0, 0, 0.0)
    assert len({r.size for r in way.ranks}) == 1
    assert way.to_json()["is_exact"]
    (way,) = plan(str(folder_of("deepseek_v3")), "1Gbit/s", parallel="experts").ways
    layers = way.messages
    assert 0 < layers < tiny.LAYERS
    assert way.sent == layers * 4 * tiny.WIDTH
    assert not way.to_json()["is_exact"]
    with pytest.raises(OptionError, match="has no experts to share out"):
        plan(str(folder_of("llama+wide")), "1Gbit/s", parallel="experts")


def test_a_plan_is_what_is_cut(open_tiny: Callable[..., Model]) -> None:
    """Headers alone tell the sizes of a shard's tables."""
    from outsize.pack.outline import of_pack

    pack = open_tiny("qwen2+wide", "q4_0").pack
    for way in (Way(), Way("sum"), Way("layers")):
        made = shards_of(pack, (2.0, 1.0), way)
        shards = split("it", pack.description, pack.tables, Ranks((2.0, 1.0)), way)
        planned = outlined(of_pack(pack), shards[0])
        assert {t.name: t.size for t in planned.tables} == {t.name: t.size for t in made[0].tables}
        assert planned.description == made[0].description


@pytest.mark.usefixtures("measured")
def test_the_command(folder_of: Callable[[str], Path]) -> None:
    fetch.pack(str(folder_of("llama+wide")), quiet=True)
    words = ["plan", str(folder_of("llama+wide")), "--memory", "4GB", "-q"]
    done = CliRunner().invoke(app, [*words, "--ranks", "2", "--link", "1Gbit/s", "--json"])
    assert json.loads(done.stdout)["best"]
    shown = CliRunner().invoke(app, [*words, "--ranks", "2"])
    assert "fastest: --parallel" in shown.stdout
    alone = CliRunner().invoke(app, [*words, "--link", "1Gbit/s"])
    assert isinstance(alone.exception, OptionError)
