"""Traces, their replay, and the laboratory around it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from outsize.bench.cache import CacheOptions, choose, replay
from outsize.caching import prefetcher
from outsize.caching.policy import EvictionPolicy, Hints, make
from outsize.caching.replay.simulate import Link, Replay, ReplaySetup
from outsize.caching.replay.trace import Event, Trace, read, waves
from outsize.cli.main import app
from outsize.engine.model import Model
from outsize.errors import OptionError, TraceError, UnsupportedError
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.plan import make as planning
from outsize.plan.hit_rates import recorded
from tests.golden import tiny

HEADER = "# n_layer=3 n_expert=8 n_expert_used=2\n# expert_bytes=1000\n"
COLUMNS = "turn,phase,step,layer,slot,expert,weight\n"


def write(path: Path, rows: list[str], header: str = HEADER, columns: str = COLUMNS) -> Path:
    path.write_text(header + columns + "\n".join(rows) + "\n")
    return path


def made(tokens: int = 40, prompt: int = 5) -> list[str]:
    """A prompt by layers, then tokens by steps; experts drift."""

    def row(phase: int, step: int, layer: int, slot: int) -> str:
        expert = (step // 3 + 3 * slot + layer * step) % 8
        return f"0,{phase},{step},{layer},{slot},{expert},{0.7 - 0.4 * slot}"

    prompts = [row(0, s, la, k) for la in range(3) for s in range(prompt) for k in range(2)]
    steps = range(prompt, prompt + tokens)
    return prompts + [row(1, s, la, k) for s in steps for la in range(3) for k in range(2)]


def test_reading(tmp_path: Path) -> None:
    trace = read(write(tmp_path / "a.csv", made()))
    assert (trace.layers, trace.experts, trace.used, trace.record_bytes) == (3, 8, 2, 1000)
    first, token = trace.events[0], trace.events[3]
    assert (first.phase, first.tokens, len(first.rows), first.number) == (0, 5, 5, 0)
    assert set(first.ids) == {i for row in first.rows for i in row}
    assert (token.phase, token.tokens, token.number, len(token.ids)) == (1, 1, 1, 2)
    assert [e.layer for e in trace.events[:6]] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("weight", "wait"), "2: no column weight|3: no column weight"),
        (lambda t: t.replace("n_expert=8", "n_expert=4"), r"a.csv:\d+: expert \d is out of range"),
        (lambda t: t.replace("n_layer=3", "n_layer=2"), r"a.csv:\d+: layer 2 is out of range"),
        (lambda t: t.replace("# n_layer=3", "# "), r"csv does not state n_layer=N"),
        (lambda t: t + "0,1,3,0,0,1,0.5\n", "step 3 of layer 0 comes after a later one"),
        (lambda t: t + "0,1,99,0\n", "7 numbers are expected"),
        (lambda t: t + "0,1,99,0,0,one,0.5\n", "7 numbers are expected"),
        (lambda t: t + "0,2,99,0,0,1,0.5\n", "phase 2"),
        (lambda t: t.split("turn")[0], "holds no rows"),
        (lambda t: "\x1f\x8b not gzip", "cannot be read"),
    ],
)
def test_bad_traces_are_refused_with_the_line(
    tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    path = write(tmp_path / "a.csv", made())
    path.write_bytes(change(path.read_text()).encode("latin-1"))
    with pytest.raises(TraceError, match=message):
        read(path)


def counts(trace: Trace, name: str, slots: int, prefetch: str = "none") -> tuple[int, ...]:
    events = trace.events
    hints = Hints(future=[e.ids for e in events], per_layer=trace.experts, layers=trace.layers)
    policy = make(name, slots, hints)
    ahead = prefetcher.make(prefetch, trace.experts)
    setup = ReplaySetup(policy, slots, Link(1e9, 1000), ahead, num_experts=trace.experts)
    t = Replay(setup).run(waves(events, policy.room))[1].stats
    return t.hits, t.cold, t.capacity, t.collision, t.ready


@pytest.mark.parametrize("slots", [2, 4, 8, 10, 14, 20])
def test_truths_of_the_paper_note(tmp_path: Path, slots: int) -> None:
    trace = read(write(tmp_path / "a.csv", made(80)))
    lru = counts(trace, "lru", slots)
    assert counts(trace, "least_stale", slots) == lru, "demand-only, least-stale is LRU"
    best = counts(trace, "belady", slots)[0]
    passes = 80  # of decoding, which alone is counted
    asked = sum(len(set(e.ids)) for e in trace.events if e.phase == 1)
    assert (asked > passes * slots) == (slots <= 4), "with few slots, not all can be hits"
    for name in ("lru", "fifo", "lfu", "lfru", "stale_layer", "stale_cyclic", "echo"):
        hits, cold, capacity, collision, _ = counts(trace, name, slots)
        assert hits + cold + capacity + collision == asked
        assert hits <= best
        assert hits <= passes * slots, "a pass cannot hit more than there are slots"


def test_what_is_meant_for_the_next_pass_is_stamped_so() -> None:
    """Layer 0 of the next token, read ahead at the last layer, outlives what this pass has used."""
    policy = make("least_stale", 4, Hints(per_layer=8))
    assert isinstance(policy, EvictionPolicy)
    policy.begin_pass()
    policy.place([0])
    policy.place([8])
    policy.place([16])
    policy.place([1], ahead=True)  # layer 0, for the next pass
    policy.begin_pass()
    assert [i for i, _ in policy.place([2]).loads] == [2]
    assert 1 in policy.slot_of
    assert 0 not in policy.slot_of


def test_prefetch_and_link_in_virtual_time() -> None:
    """One record takes 1 ms, computing a layer 2 ms: all but the first read of each layer is hidden."""
    layers = 3
    events = [
        Event(n, 1, la, 1, (la * 8 + n % 8,), (1.0,), ((la * 8 + n % 8,),))
        for n in range(20)
        for la in range(layers)
    ]

    def stall(prefetch: str) -> float:
        link = Link(1e6, 1000, latency_s=0.0, layer_s=2e-3)
        ahead = prefetcher.make(prefetch, 8)
        policy = make("lru", 6, Hints(per_layer=8))
        setup = ReplaySetup(policy, 6, link, ahead, num_experts=8)
        return Replay(setup).run(events)[1].stats.waited_s

    assert stall("none") == pytest.approx(60e-3)
    assert stall("oracle") == pytest.approx(1e-3)
    assert stall("oracle:0.5") > 10e-3


def test_the_grid_and_its_choice(tmp_path: Path) -> None:
    trace = read(write(tmp_path / "a.csv", made(60)))
    options = CacheOptions(
        capacity="40%,60%", eviction="lru,fifo,echo,belady,static", bandwidth="1MB/s,2MB/s"
    )
    rows = replay((trace,), options, quiet=True)
    assert len(rows) == 2 * 5 * 2 * 2  # capacities, policies, rates, phases
    assert all(0 <= float(r["reuse_hit_rate"]) <= float(r["hit_rate"]) <= 1 for r in rows)
    best, why = choose(rows)
    assert best.split(",")[0] in ("lru", "fifo", "echo")
    assert "use here" in why
    assert choose([r for r in rows if r["eviction"] == "belady"])[0] == ""
    layered = replay(
        (trace,), CacheOptions(capacity="50%", eviction="lru", per_layer=True), quiet=True
    )
    assert {r["pool"] for r in layered} == {"layer"}
    with pytest.raises(TraceError, match=r"fewer than the 2 experts .* at least"):
        replay((trace,), CacheOptions(capacity="1%"), quiet=True)
    for bad in ({"capacity": "many"}, {"bandwidth": "0GB/s"}, {"miss": "pray"}):
        with pytest.raises(OptionError):
            replay(
                (trace,), CacheOptions(**{"capacity": "50%", "eviction": "lru"} | bad), quiet=True
            )
    with pytest.raises(UnsupportedError, match="did you mean"):
        replay((trace,), CacheOptions(capacity="50%", eviction="lruu"), quiet=True)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.csv", made(30))
    config = tmp_path / "config.toml"
    config.write_text('verify = "always"\n')
    monkeypatch.setenv("OUTSIZE_CONFIG", str(config))
    page = tmp_path / "page.html"
    done = CliRunner().invoke(
        app,
        ["bench", "cache", str(path), "--capacity", "50%,70%", "--eviction", "lru,echo,belady",
         "--html", str(page), "--json", "--write-config", "-q"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {"trace", "eviction", "prefetch", "miss", "capacity", "phase", "hit_rate",
            "reuse_hit_rate", "stall_s_per_token", "collision_misses"} <= rows[0].keys()  # fmt: skip
    assert page.read_text().count("<svg") == 3
    text = config.read_text()
    assert 'experts = "' in text
    assert "verify" in text


@pytest.mark.parametrize("family", ["olmoe"])
def test_tracing_a_model(
    family: str, folder_of: Callable[[str], Path], home: Path, tmp_path: Path
) -> None:
    folder = str(folder_of(family))
    fetch.pack(folder, encoding="auto", quiet=True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('hello there\n{"prompt": "and again"}\n')
    out = tmp_path / "t.csv"
    runner = CliRunner()
    arguments = [
        "trace",
        folder,
        "--prompts",
        str(prompts),
        "-o",
        str(out),
        "-n",
        "6",
        "--raw",
        "-q",
    ]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    trace = read(out)
    assert (trace.layers, trace.experts, trace.used) == (tiny.LAYERS, tiny.EXPERTS, 3)
    assert {e.phase for e in trace.events} == {0, 1}
    later = [e for e in trace.events if e.layer > 0]
    assert all(e.early for e in later), "the gate of a later layer was asked early"
    with out.open() as f:
        rows = list(csv.DictReader(line for line in f if not line.startswith("#")))
    assert {r["turn"] for r in rows} == {"0", "1"}
    for bad, message in (("", "holds no prompts"), ('{"a": 1}\n', "line 1: no text under prompt")):
        prompts.write_text(bad)
        done = runner.invoke(app, arguments)
        assert message in str(done.exception)


def test_plans_with_a_recorded_trace(
    tmp_path: Path, folder_of: Callable[[str], Path], open_paged: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """`plan --trace` expects of experts what a replay of it reaches; another model's trace is refused."""
    model = open_paged("olmoe")
    trace = read(write(tmp_path / "a.csv", made(80)))
    rates = recorded(trace, model.pack.description, "lru")
    hits, *misses = counts(trace, "lru", int(0.4 * trace.size))
    assert rates.points[-1][0] == 0.4
    prompt = [e for e in trace.events if e.phase == 0]
    assert abs(rates(0.4)[0] - hits / (hits + sum(misses))) < 0.05, (rates, len(prompt))
    assert rates(0.3)[0] == pytest.approx((rates(0.2)[0] + rates(0.4)[0]) / 2)
    assert rates(1.0) == (1.0, 1.0)
    assert rates(0.0) == (0.0, 0.0)
    monkeypatch.setattr(planning, "runtime_bytes", lambda *_: 0)
    load_options = LoadOptions(memory=model.placement.budget, context=256, quiet=True)
    plan = planning.make(str(folder_of("olmoe")), load_options, 16, tmp_path / "a.csv")
    assert plan.cost.hit_rates_from == "a"
    assert planning.make(str(folder_of("olmoe")), load_options, 16).cost.hit_rates_from == "a prior"
    dense = planning.make(str(folder_of("llama")), LoadOptions(memory="2GB", quiet=True), 16)
    with pytest.raises(TraceError, match="this model none; record one with"):
        recorded(trace, dense.outline.description, "lru")
