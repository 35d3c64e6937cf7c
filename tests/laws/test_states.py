"""Laws of sequence states (kv/state.py): forgetting tokens and running others equals never having run the
first, bit by bit; what cannot be forgotten alone is said; a few rows, many, and one by one agree."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import outsize
from outsize.checkpoint.opening import open_checkpoint
from outsize.engine.batch import Batch
from outsize.engine.model import Model
from outsize.errors import OptionError, ReadError, UnsupportedError
from outsize.family.find import recipe
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.kernels.delta import DeltaSpec, delta_rows, delta_span
from outsize.kv.prefix import CachedPrefix
from outsize.kv.state import KEEP, MOST, Sizes, State
from outsize.model_parts import Delta
from outsize.pack import fetch
from outsize.pack.outline import of_pack
from outsize.parallel import split
from outsize.parallel.split import Way
from outsize.plan import fixed
from tests.golden import tiny
from tests.laws.test_batch import alone, chunked, options, outcome, prompt

SIZES = Sizes((2, 3), 4, 2, 2)
STEP = st.tuples(st.integers(1, 20), st.integers(0, 40), st.booleans())


def fold(now: Tensor, window_PR: Tensor, gates_TG: Tensor) -> None:
    """A state's numbers after some tokens: of each, of the one before it and of what was."""
    for t, gates in enumerate(gates_TG):
        now.mul_(0.5).add_(window_PR[t : t + 3].sum()).add_(gates.sum())


def add(state: State, first: int, count: int, wide: bool) -> Tensor:
    """Tokens whose inputs are their numbers; the numbers after them."""
    rows = torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(-1, 4)
    window = state.take(rows, rows[:, :2], fold, wide)
    assert window[-count:, 0].tolist() == rows[:, 0].tolist()
    fold(state.now, window, rows[:, :2])
    state.done(fold)
    return state.now.clone()


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=12))
def test_truncate_then_append_is_never_having_appended(steps: list[tuple[int, int, bool]]) -> None:
    state, plain = State(SIZES, torch.float32), State(SIZES, torch.float32)
    kept: list[tuple[int, int, bool]] = []
    for count, back, wide in steps:
        length = state.reachable(max(0, state.end - back))
        assert length <= state.end
        state.truncate(length)
        assert state.end == length
        add(state, length, count, wide)
        while kept and kept[-1][0] >= length:
            kept.pop()
        if kept and sum(kept[-1][:2]) > length:
            kept[-1] = kept[-1][0], length - kept[-1][0], False
        kept.append((length, count, wide))
    for first, count, wide in kept:
        last = add(plain, first, count, wide)
    assert torch.equal(state.now, last)
    assert state.count <= MOST or state.reachable(state.end - 1) < state.end - 1


def test_drafts_can_be_forgotten() -> None:
    state = State(SIZES, torch.float32)
    add(state, 0, 100, True)
    assert state.reachable(99) == 0
    add(state, 100, 30, True)
    assert (state.reachable(129), state.reachable(100), state.reachable(99)) == (100, 100, 0)
    for i in range(200):
        add(state, 130 + i, 1, False)
        assert state.reachable(state.end - min(i, KEEP)) == state.end - min(i, KEEP)


def test_a_state_comes_back_as_it_was() -> None:
    state, file = State(SIZES, torch.bfloat16), io.BytesIO()
    add(state, 0, 30, True)
    add(state, 30, 5, False)
    before, size = state.now.clone(), state.nbytes
    state.write(file)
    assert state.nbytes == 0
    file.seek(0)
    state.read(file)
    assert torch.equal(state.now, before)
    assert state.nbytes == size <= SIZES.nbytes(2)
    state.truncate(32)
    assert add(state, 32, 3, False).tolist() == before.tolist()
    state.write(file)
    file.truncate(9)
    file.seek(0)
    with pytest.raises(ReadError, match="shorter than it was"):
        state.read(file)


@pytest.mark.parametrize("tiled", [False, True])
def test_many_tokens_are_as_one_by_one(tiled: bool) -> None:
    torch.manual_seed(1)
    sizes = Delta(2, 6, 16, 24, 4, is_tiled=tiled)
    channels = 2 * sizes.keys + sizes.values
    spec, window = DeltaSpec(sizes, torch.randn(4, channels) / 2), torch.randn(143, channels)
    gates = torch.cat([-torch.rand(140, 6), torch.rand(140, 6)], dim=1)
    one, many = torch.zeros(6, 16, 24), torch.zeros(6, 16, 24)
    slow = delta_rows(spec, one, window, gates)
    fast = delta_span(spec, many, window, gates)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(many, one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", tiny.STATEFUL)
def test_forgetting_in_a_model(family: str, native: bool, open_tiny: Callable[..., Model]) -> None:
    """After drafts of every length, some of which are right, the bits are those of no draft."""
    t = open_tiny(family, "int8", native).transformer
    wanted, ours = t.new_kv(), t.new_kv()
    for kv in (wanted, ours):
        full(t, [Span(0, tiny.TOKENS[:20])], [kv])
    at = 20
    for wrong in (3, 0, 13, 1, 7, 2):  # a step has up to 16 rows
        rows = [full(t, [Span(at + i, [tiny.TOKENS[at + i]])], [wanted])[0] for i in range(3)]
        drafted = [*tiny.TOKENS[at : at + 3], *range(5, 5 + wrong)]
        (out,) = full(t, [Span(at, drafted, len(drafted))], [ours])
        assert torch.equal(out.logits_KV[:3], torch.cat([row.logits_KV for row in rows]))
        at += 3
    assert wanted.length == at


@pytest.mark.parametrize("draft", ["ngram:k=8", "model"])
def test_any_drafter_gives_the_text_of_none(
    draft: str, open_tiny: Callable[..., Model], folder_of: Callable[[str], Path]
) -> None:
    spec = f"model:{folder_of('qwen3_5')}:k=5" if draft == "model" else draft
    plain, source = open_tiny("qwen3_5", "int8"), str(folder_of("qwen3_5"))
    with outsize.load(source, encoding="int8", draft=spec, quiet=True) as model:
        for seed in range(3):
            how = {"raw": True, "max_tokens": 40, "temperature": 0.7 * (seed > 0), "seed": seed}
            (ours,) = model.generate("abcabcabcab", **how)  # type: ignore[arg-type]
            (theirs,) = plain.generate("abcabcabcab", **how)  # type: ignore[arg-type]
            assert ours.text == theirs.text
            assert draft == "model" or ours.drafted > 0 or seed


def test_replies_are_put_aside_and_come_back(
    open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    with chunked(open_tiny("qwen3_5", "int8")) as model:
        prompts = [prompt(i, n) for i, n in enumerate((50, 40, 45))]
        wanted = [alone(model, ids, i) for i, ids in enumerate(prompts)]
        monkeypatch.setattr("outsize.engine.batch.GRAIN", 2)
        monkeypatch.setattr(Batch, "room", 112)
        requests = [model.start(ids, options(i)) for i, ids in enumerate(prompts)]
        batch, aside = Batch(model.scheduler), 0
        for request in requests:
            batch.add(request)
        while ran := batch.step():
            aside += any(live.swapped is not None for live in batch.waiting)
            for request in ran:
                request.advance(0.0)
        assert [outcome(r) for r in requests] == wanted
        assert aside


def test_a_conversation_computes_what_it_must(open_tiny: Callable[..., Model]) -> None:
    """A prefix that is not reachable is computed anew, whatever was in common."""
    model = open_tiny("qwen3_5", "int8")
    with chunked(model):
        prefix, ids = CachedPrefix(model.new_kv(200)), prompt(3, 70)
        full(model.transformer, [Span(0, ids)], [prefix.kv])
        prefix.tokens = list(ids)
        assert prefix.shared([*ids, 9]) == 70
        assert prefix.shared([*ids[:66], 7, 8]) == 66  # of the short last chunk, each
        assert prefix.shared([*ids[:50], 7, 8]) == 0
        prefix.kv.truncate(0)
        assert prefix.kv.length == 0
        (ours,) = model.generate("the sea", raw=True, max_tokens=4)
    assert ours.text == model.generate("the sea", raw=True, max_tokens=4)[0].text


@pytest.mark.parametrize("family", tiny.STATEFUL)
def test_what_states_cannot_have_is_refused(family: str, folder_of: Callable[[str], Path]) -> None:
    source = str(folder_of(family))
    with pytest.raises(OptionError, match=r"prefill is 'lazy'.*keep a state.*prefill=full"):
        outsize.load(source, prefill="lazy", quiet=True)
    d = recipe(open_checkpoint(folder_of(family))).description
    with pytest.raises(UnsupportedError, match=r"states of sequences.*run it on one"):
        split.check("m", d, 2, Way("layers", "whole"))
    with pytest.raises(OptionError, match=r"prefix_cache is 'memory'.*keep a state"):
        outsize.load(source, prefix_cache="memory", quiet=True)
    with outsize.load(source, quiet=True) as model:
        with pytest.raises(OptionError, match=r"prefill is 'lazy'.*keep a state"):
            model.generate("abc", raw=True, prefill="lazy")
        kv = model.new_kv(40)
        full(model.transformer, [Span(0, tiny.TOKENS[:20])], [kv])
        with pytest.raises(AssertionError):
            kv.truncate(7)


def test_the_plan_has_a_row_for_them(folder_of: Callable[[str], Path]) -> None:
    outline = of_pack(fetch.pack(str(folder_of("qwen3_5")), encoding="bf16", quiet=True))
    costs = fixed.fixed_costs(outline, 0, 0, 64)
    with outsize.load(str(folder_of("qwen3_5")), encoding="bf16", quiet=True) as model:
        kv = model.transformer.new_kv(64)
        full(model.transformer, [Span(0, tiny.TOKENS[:30])], [kv])
        held = sum(state.nbytes for state in kv.states.values())
    assert costs[fixed.STATES] == held
    assert fixed.stored_bytes(outline) == 2 * tiny.KV_HEADS * tiny.HEAD_DIM * 2  # of one layer
