"""The law of experts: whatever stays in memory and whatever is read ahead, the logits are those of the
model with all experts in memory, bit for bit; and a replay of what a run asked for counts what it counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from outsize import registry
from outsize.caching import eviction, prefetcher
from outsize.caching.policy import Hints, make
from outsize.caching.prefetcher import Scored
from outsize.caching.replay.simulate import Link, Replay, ReplaySetup
from outsize.caching.replay.trace import Event, waves
from outsize.encoding.find import encoding as encoding_of
from outsize.engine.model import Model
from outsize.errors import OptionError, UnsupportedError
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.home import home as home_folder
from outsize.kernels.find import native_in
from outsize.kernels.plain import PLAIN
from outsize.kernels.rows import Rows
from outsize.model.ffn.dense import Dense
from outsize.model.ffn.expert_sums import Built, add, native_experts
from outsize.model.layers import Linear
from outsize.model.step import Step
from outsize.model.transformer import Transformer
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.storage.table import Weight
from outsize.weights import load as weights
from outsize.weights.open_pack import LoadPlan
from outsize.weights.residency import Share, all_of
from outsize.weights.spec import REPLAYED, ExpertOptions, parse_experts
from tests.golden import tiny
from tests.laws.spans import logits

LIVE = [n for n in registry.names(eviction) if n not in REPLAYED]


@contextmanager
def opened(
    pack: Pack, capacity: int | None, expert_options: ExpertOptions, copies: Pack | None = None
) -> Iterator[Transformer]:
    """With this many slots for experts; None: with all."""
    shares = {t.name: all_of(t) for t in pack.tables}
    if capacity is not None:
        shares |= {t.name: Share((), capacity) for t in pack.tables if t.kind == "experts"}
    loaded = weights.load(pack, PLAIN, LoadPlan(shares, "first", expert_options, copies))
    try:
        yield Transformer(pack.description, loaded)
    finally:
        loaded.close()


@pytest.fixture(scope="module")
def packs(folder_of: Callable[[str], Path], home: Path) -> dict[str, Pack]:
    return {f: fetch.pack(str(folder_of(f)), encoding="int8", quiet=True) for f in tiny.MIXTURES}


@pytest.fixture(scope="module")
def resident(packs: dict[str, Pack]) -> dict[str, Tensor]:
    out = {}
    for family, pack in packs.items():
        with opened(pack, None, ExpertOptions()) as model:
            out[family] = logits(model)
    return out


def ranked(pack: Pack) -> range:
    return range(sum(len(t.keys) for t in pack.tables if t.kind == "experts"))


AHEAD = ("none", "top:3", "score:0.1", "quantile:0.8", "previous")
# Each way on the routers of old; each router that differs from them once in each way ahead.
WAYS = [
    *((f, 10, ahead, e) for f in tiny.OLD_MIXTURES for ahead in AHEAD for e in LIVE),
    *(("gpt_oss", 17, ahead, e) for ahead in AHEAD for e in LIVE),
    *((f, 10, AHEAD[i % len(AHEAD)], LIVE[i % len(LIVE)]) for i, f in enumerate(tiny.NEW_MIXTURES)),
]
SLOW = [
    *(
        (f, 17, ahead, e)
        for f in tiny.OLD_MIXTURES
        if f != "gpt_oss"
        for ahead in AHEAD
        for e in LIVE
    ),
    *((f, 10, ahead, e) for f in tiny.NEW_MIXTURES for ahead in AHEAD for e in LIVE),
]


@pytest.mark.parametrize(
    ("family", "capacity", "prefetch", "eviction"),
    [*WAYS, *(pytest.param(*way, marks=pytest.mark.slow) for way in SLOW)],
)
def test_same_bits(
    packs: dict[str, Pack], resident: dict[str, Tensor],
    family: str, prefetch: str, eviction: str, capacity: int,
) -> None:  # fmt: skip
    expert_options = ExpertOptions(eviction, prefetch, ranked=ranked(packs[family]))
    with opened(packs[family], capacity, expert_options) as model:
        assert torch.equal(logits(model), resident[family])
        stats = model.loaded.expert_stats
        kinds = stats.ready + stats.late + stats.cold + stats.capacity + stats.collision
        assert stats.misses == kinds > 0


def test_rows_do_not_see_company(packs: dict[str, Pack]) -> None:
    """One token of three sequences at once, and each alone."""
    with opened(packs["olmoe"], 12, ExpertOptions()) as model:
        starts = [tiny.TOKENS[:7], tiny.TOKENS[9:30], tiny.TOKENS[5:8]]
        alone = [full(model, [Span(0, s)], [model.new_kv()])[0].logits_KV for s in starts]
        kvs = [model.new_kv() for _ in starts]
        together = full(model, [Span(0, s) for s in starts], kvs)
        assert all(torch.equal(a, b.logits_KV) for a, b in zip(alone, together, strict=True))
        (single,) = full(model, [Span(7, [3])], [kvs[0]])
        spans = [Span(7, [3]), Span(21, [4])]
        both = full(model, spans, kvs[:2])
        assert torch.equal(single.logits_KV, both[0].logits_KV)


@pytest.mark.parametrize(
    "encoding", ["int4", "group4", "group5", "group8", "q4_0", "q5_1", "nvfp4"]
)
def test_experts_in_one_call_are_the_single_ones(encoding: str) -> None:
    kernels = native_in(home_folder() / "native")
    if kernels is None:
        pytest.skip("no C compiler on this machine")
    width, inner, rows, used = 128, 192, 5, 3
    kind = encoding_of(encoding, kernels)

    def expert() -> Built:
        pair = {"gate_up": torch.randn(2 * inner, width), "down": torch.randn(width, inner)}
        w = {k: (Weight(kind, kind.encode(m), len(m)),) for k, m in pair.items()}
        return Built(w, Dense((Linear(w["gate_up"]), Linear(w["down"])), "silu"), native_experts(w))

    x, step = torch.randn(rows, width).bfloat16(), Step(Rows([], False), {}, kernels)
    built = [expert() for _ in range(4)]
    places = [
        [(0, 0, 0.5), (3, 2, 0.25)],
        [(1, 1, 1.0)],
        [(t, 1, 0.1 * t) for t in (0, 2, 3, 4)],
        [(4, 0, 1.5)],
    ]
    one, all_at_once = torch.zeros(rows, used, width), torch.zeros(rows, used, width)
    for e, p in zip(built, places, strict=True):
        add(e.ffn, p, x, step, one)
    native = [e.native for e in built if e.native is not None]
    assert len(native) == len(built)
    assert kernels.experts(native, places, x, all_at_once, "silu")
    assert torch.equal(one, all_at_once)
    assert one.any()


@pytest.mark.parametrize(
    ("family", "encoding"),
    [
        *((family, e) for family in ("olmoe", "qwen3_moe") for e in ("int4", "q4_0")),
        ("qwen3_moe", "palette3-fp16"),  # levels of its own come with each record
    ],
)
def test_same_bits_with_kernels(
    family: str, encoding: str, open_tiny: Callable[..., Model]
) -> None:
    """The model with all it has held, and with few experts and layers, both through the native kernels."""
    model = open_tiny(family, encoding)
    pack = model.pack
    backend = native_in(home_folder() / "native") or PLAIN
    expected = logits(model.transformer)
    shares = {t.name: all_of(t) for t in pack.tables}
    shares |= {t.name: Share((), 12) for t in pack.tables if t.kind == "experts"}
    shares["attn-0"] = Share((), 2)
    loaded = weights.load(pack, backend, LoadPlan(shares))
    try:
        few = Transformer(pack.description, loaded, backend)
        assert torch.equal(logits(few), expected)
    finally:
        loaded.close()


def test_routing_by_what_is_in_memory(packs: dict[str, Pack], resident: dict[str, Tensor]) -> None:
    """Lossy, neutral at 0, and worth more hits the larger it is."""
    hits = []
    for spec in ("cached:0", "cached:0.2", "cached:1"):
        expert_options = parse_experts(f"lru,routing={spec}")
        assert expert_options.is_lossy == (spec != "cached:0")
        with opened(packs["olmoe"], 12, expert_options) as model:
            assert torch.equal(logits(model), resident["olmoe"]) or expert_options.is_lossy
            hits.append(model.loaded.expert_stats.hits)
    assert hits[0] < hits[1] < hits[2]
    for bad in ("cached:2", "cached:x", "other"):
        with pytest.raises(OptionError, match="native or cached:AMOUNT"):
            parse_experts(f"lru,routing={bad}")


class Recorded:
    """Events as they happen, cut into passes by the layer."""

    def __init__(self, count: int) -> None:
        self.events: list[Event] = []
        self._count, self._number = count, -1

    def __call__(
        self,
        layer: int,
        rows: Sequence[Sequence[int]],
        ws: Sequence[Sequence[float]],
        early: Scored,
    ) -> None:
        self._number += layer == 0
        ids = tuple(tuple(layer * self._count + e for e in row) for row in rows)
        union = tuple(dict.fromkeys(i for row in ids for i in row))
        union = tuple(sorted(union)) if len(rows) > 16 else union
        self.events.append(
            Event(self._number, 1, layer, len(rows), union, (1.0,) * len(union), ids, early)
        )


@pytest.mark.parametrize("eviction", LIVE)
def test_a_replay_counts_what_the_run_counted(packs: dict[str, Pack], eviction: str) -> None:
    pack, capacity, count = packs["qwen3_moe"], 11, tiny.EXPERTS
    recorded = Recorded(count)
    expert_options = ExpertOptions(eviction, ranked=ranked(pack), recorder=recorded)
    with opened(pack, capacity, expert_options) as model:
        logits(model)
        lived = model.loaded.expert_stats
    hints = Hints(per_layer=count, layers=tiny.LAYERS, ranked=ranked(pack))
    stride = next(t.stride for t in pack.tables if t.kind == "experts")
    policy, nothing = make(eviction, capacity, hints), prefetcher.make("none", count)
    setup = ReplaySetup(policy, capacity, Link(1e9, stride), nothing, num_experts=count)
    found = Replay(setup).run(waves(recorded.events, policy.room))[1].stats
    for name in ("hits", "misses", "cold", "capacity", "collision", "bytes_demanded"):
        assert getattr(found, name) == getattr(lived, name), name


@pytest.mark.parametrize("misses", ["drop:0.9", "substitute"])
def test_lossy_misses_are_counted_and_change_the_answer(
    packs: dict[str, Pack], resident: dict[str, Tensor], misses: str
) -> None:
    with opened(packs["olmoe"], 10, ExpertOptions(misses=misses)) as model:
        ours = logits(model)
        stats = model.loaded.expert_stats
    assert stats.dropped + stats.substituted > 0
    assert not torch.equal(ours, resident["olmoe"])
    with opened(packs["olmoe"], None, ExpertOptions(misses=misses)) as model:
        assert torch.equal(logits(model), resident["olmoe"]), "nothing missing, nothing lost"


def test_knobs() -> None:
    assert parse_experts("") == ExpertOptions()
    assert parse_experts("lru, prefetch=score:0.2") == ExpertOptions("lru", "score:0.2")
    assert parse_experts("misses=drop:0.2").is_lossy
    assert parse_experts("misses=copy:int4:0.2").copies == "int4"
    assert parse_experts("misses=copy:int4").is_lossy
    for text, error in (
        ("lruu", UnsupportedError), ("belady", OptionError), ("prefetch=oracle", OptionError),
        ("prefetch=score:7", OptionError), ("prefetch=soothsayer", UnsupportedError),
        ("misses=ignore", OptionError), ("misses=copy", OptionError),
        ("misses=copy:int4:7", OptionError), ("lru,fifo", OptionError), ("colour=red", OptionError),
    ):  # fmt: skip
        with pytest.raises(error):
            parse_experts(text)
    assert prefetcher.make("top:2", 8) is not None
