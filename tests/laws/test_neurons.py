"""The law of paged neurons: all of them chosen, the logits are the dense model's; whatever is chosen,
they depend on the row alone: not on what stays in memory, nor on its policy, on threads, or on other
rows."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outsize import registry
from outsize.caching import eviction
from outsize.caching.policy import Hints
from outsize.caching.policy import make as make_policy
from outsize.errors import DiskFullError, PackError, UnsupportedError
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.home import home as home_folder
from outsize.kernels.find import native_in
from outsize.kernels.plain import PLAIN
from outsize.kernels.threads import Threads
from outsize.model.predictors.choose import Rule
from outsize.model.transformer import Transformer
from outsize.pack import bundles as cut
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.pack.tables import Matrix, TableHeader, field_bytes
from outsize.progress import silent
from outsize.weights import load as weights
from outsize.weights.bundles import bundles_of, make
from outsize.weights.open_pack import LoadPlan
from outsize.weights.residency import Share, all_of
from outsize.weights.spec import PROFILED, REPLAYED
from tests.golden import tiny
from tests.laws.spans import logits

LIVE = [n for n in registry.names(eviction) if n not in (*REPLAYED, PROFILED)]


class Fixed:
    """Chooses by the row's own numbers: about half of the bundles, or all, or none; or chunks of them."""

    def __init__(self, count: int, how: str) -> None:
        self._count, self._how = count, how

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        score = torch.stack([x.float()[: self._count] for x in x_TD])
        if self._how == "chunks":
            return Rule(0.0, 0.7).chosen(score, PLAIN), score
        floor = {"all": -torch.inf, "some": 0.0, "none": torch.inf}[self._how]
        return score > floor, score


def by_use(pack: Pack) -> Tensor:
    """Some order of a model's neurons."""
    d = pack.description
    generator = torch.Generator().manual_seed(0)
    return torch.stack(
        [torch.randperm(d.ffn_width, generator=generator) for _ in range(d.num_layers)]
    )


@contextmanager
def opened(
    pack: Pack,
    how: str | None,
    slots: int | None = None,
    policy: str = "lru",
    order: Tensor | None = None,
    takes_resident: bool = False,
) -> Iterator[Transformer]:
    """With so many slots for bundles; `how` None: dense; `order`: bundles of few, in this order."""
    backend = native_in(home_folder() / "native") or PLAIN
    bundles = make(pack, None, silent, order)
    shares = {t.name: all_of(t) for t in pack.tables}
    if slots is not None:
        shares |= {t.bundles.name: Share((), slots) for t in bundles.tables}
    plan = LoadPlan(shares, neurons=None if how is None else (bundles, policy))
    loaded = weights.load(pack, backend, plan)
    try:
        model = Transformer(pack.description, loaded, backend)
        if how is not None:
            chosen = [Fixed(bundles.count, how)] * pack.description.num_layers
            model.page_neurons(chosen, takes_resident=takes_resident)
        yield model
    finally:
        loaded.close()


def packed(folder_of: Callable[[str], Path], family: str, encoding: str) -> Pack:
    return fetch.pack(str(folder_of(family)), encoding=encoding, quiet=True)


@pytest.mark.parametrize("family", ["llama", "llama+biases", "gemma3", "opt", "falcon"])
@pytest.mark.parametrize("encoding", ["fp32", "bf16", "int8", "q4_0", "q4_1", "q5_0"])
def test_all_chosen_is_dense(
    folder_of: Callable[[str], Path], home: Path, family: str, encoding: str
) -> None:
    """In natural order, bit for bit, through one slot or two."""
    pack = packed(folder_of, family, encoding)
    with opened(pack, None) as model:
        expected = logits(model)
    with opened(pack, "all", 2) as model:
        assert torch.equal(logits(model), expected)
        assert model.loaded.expert_stats.misses > 0
    with opened(pack, "some") as model:
        assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("encoding", ["bf16", "fp8", "int4", "int8", "q4_0", "group5", "tq"])
@pytest.mark.parametrize("bundle", [1, 8, 16, 32, 128])
def test_bundles_hold_all_or_are_refused(encoding: str, bundle: int) -> None:
    """Of gate and up, every byte once: rows that are stored together are not cut."""
    gate_up, down = Matrix(encoding, 2 * 512, 256, 0), Matrix(encoding, 256, 512, 0)
    table = TableHeader("ffn-0", "layers", (0,), 0, {"gate_up": (gate_up,), "down": (down,)}, ())
    if bundle % max(spec.rows for spec in gate_up.specs.values()):
        with pytest.raises(UnsupportedError, match="would cut"):
            cut.layout(table, bundle)
        return
    form = cut.layout(table, bundle)
    held = sum(r.size for r in form.regions if r.tensor != cut.DOWN) * form.count
    assert held == sum(field_bytes(spec) for spec in gate_up.specs.values())


@pytest.mark.parametrize("family", ["llama", "llama+biases", "opt", "falcon"])
@pytest.mark.parametrize("encoding", ["bf16", "int8", "q4_0", "q4_1", "q5_0"])
def test_all_chosen_in_another_order_is_nearly_dense(
    folder_of: Callable[[str], Path], home: Path, family: str, encoding: str
) -> None:
    """Down is re-encoded in eight bits: within a twentieth of the logits' spread."""
    pack = packed(folder_of, family, encoding)
    with opened(pack, None) as model:
        expected = logits(model)
    with opened(pack, "all", 3, order=by_use(pack)) as model:
        found = logits(model)
    assert float((found - expected).norm()) < 0.05 * float(expected.norm())
    with opened(pack, "none", order=by_use(pack)) as model:
        assert float((logits(model) - expected).norm()) > 0.05 * float(expected.norm())


def test_a_folder_that_cannot_be_written(
    folder_of: Callable[[str], Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, and nothing half made is left."""
    pack, count = packed(folder_of, "llama", "int8"), tiny.FFN
    path = bundles_of(pack, count).path

    def full_disk(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("outsize.weights.bundles.sync", full_disk)
        with pytest.raises(DiskFullError, match="neurons need"):
            make(pack, count, silent)
    assert not [*path.parent.glob(f"*{path.name}*/*")]
    path.write_text("no folder")
    with pytest.raises(PackError, match="cannot write"):
        make(pack, count, silent)
    path.unlink()


Half = tuple[Pack, Tensor | None, str, Tensor]


@pytest.fixture(scope="module", params=["int8", "q5_0", "q5_0 by use", "q5_0 by use in chunks"])
def half(request: pytest.FixtureRequest, folder_of: Callable[[str], Path], home: Path) -> Half:
    """A model, the order of its neurons, how they are chosen, and what it says with about half of them, all
    in memory."""
    pack = packed(folder_of, "llama", request.param.partition(" ")[0])
    order = by_use(pack) if "use" in request.param else None
    how = "chunks" if "chunks" in request.param else "some"
    with opened(pack, how, order=order) as model:
        return pack, order, how, logits(model)


@pytest.mark.parametrize("policy", LIVE)
@pytest.mark.parametrize("slots", [1, 4])
def test_same_bits_at_any_capacity_and_policy(half: Half, policy: str, slots: int) -> None:
    pack, order, how, expected = half
    with opened(pack, how, slots, policy, order) as model:
        assert torch.equal(logits(model), expected)
        assert model.loaded.expert_stats.misses > 0
        assert (
            max(len(c.slot_table.slot_of) for c in model.loaded.caches if c.slots == slots) <= slots
        )


def test_same_bits_with_any_number_of_threads(half: Half) -> None:
    pack, order, how, expected = half
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with opened(pack, how, 4, order=order) as model:
                model.threads = Threads(count, lambda: None)
                assert torch.equal(logits(model), expected)
    finally:
        torch.set_num_threads(before)


def test_rows_do_not_see_company(half: Half) -> None:
    """One token of three sequences at once, a draft's five in a row, and each alone."""
    pack, order, how, _ = half
    with opened(pack, how, 5, order=order) as model:
        starts = [tiny.TOKENS[:7], tiny.TOKENS[9:30], tiny.TOKENS[5:8]]
        alone = [full(model, [Span(0, s)], [model.new_kv()])[0].logits_KV for s in starts]
        kvs = [model.new_kv() for _ in starts]
        together = full(model, [Span(0, s) for s in starts], kvs)
        assert all(torch.equal(a, b.logits_KV) for a, b in zip(alone, together, strict=True))
        singles = logits(model, [[i, i + 1] for i in range(9)])
        assert torch.equal(singles, logits(model, [[0, 4], [4, 9]]))


@settings(max_examples=100, deadline=None)
@given(
    trace=st.lists(
        st.lists(st.sets(st.integers(0, 5), max_size=4), min_size=3, max_size=3),
        min_size=1,
        max_size=12,
    ),
    capacity=st.integers(4, 14),
)
def test_the_window_against_sets(trace: list[list[set[int]]], capacity: int) -> None:
    """Three layers of six: what the last k tokens used is there, for every k whose union fits; and what is
    evicted was last used no later than anything that stays."""
    policy = make_policy("window", capacity, Hints(per_layer=6, layers=3))
    used: list[set[int]] = []  # by token, in all layers
    last: dict[int, int] = {}
    there: dict[int, int] = {}
    for token, layers in enumerate(trace):
        policy.begin_pass()
        used.append(set())
        for layer, some in enumerate(layers):
            ids = [6 * layer + i for i in sorted(some)]
            policy.observe(layer, [ids])
            placed = policy.place(ids)
            gone = {i for i, slot in there.items() if slot in dict(placed.loads).values()} - set(
                ids
            )
            there = {i: s for i, s in there.items() if i not in gone} | placed.slots
            last |= dict.fromkeys(ids, token)
            used[-1] |= set(ids)
            assert all(last[g] <= last[i] for g in gone for i in there)
        kept = set[int]()
        for before in reversed(used):  # k grows as long as all of it fits
            kept |= before
            if len(kept) > capacity:
                break
            assert kept <= there.keys()


def test_draft_tokens_that_may_be_rejected_go_first() -> None:
    policy = make_policy("window", 4, Hints(per_layer=10, layers=1))
    policy.begin_pass()
    policy.observe(0, [[0], [1], [2], [3]])
    policy.place([0, 1, 2, 3])
    policy.begin_pass()
    policy.observe(0, [[4]])
    placed = policy.place([4])
    assert placed.slots[4] == policy.place([4]).slots[4]
    kept = policy.place([0, 1, 2])
    assert not kept.loads  # 3 was the last of four rows


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_is_in_memory_is_computed_too(
    family: str, folder_of: Callable[[str], Path], home: Path
) -> None:
    """All of it there: the dense model's bits, whatever is chosen. Nothing kept: those of what is chosen.
    Some kept: neither."""
    pack = packed(folder_of, family, "q5_0")
    with opened(pack, None) as model:
        dense = logits(model)
    with opened(pack, "some") as model:
        predicted = logits(model)
    assert not torch.equal(predicted, dense)
    with opened(pack, "some", takes_resident=True) as model:
        assert torch.equal(logits(model), dense)
    with opened(pack, "none", takes_resident=True) as model:
        assert torch.equal(logits(model), dense)
        assert not model.loaded.expert_stats.hits
    with opened(pack, "some", 4, takes_resident=True) as model:
        some = logits(model)
    assert not torch.equal(some, predicted)
    assert not torch.equal(some, dense)
    with opened(pack, "some", 1, takes_resident=True) as model:
        alone = logits(model, [[i, i + 1] for i in range(9)])
    with opened(pack, "some", 1) as model:
        assert torch.equal(alone, logits(model, [[i, i + 1] for i in range(9)]))
