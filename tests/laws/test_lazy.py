"""The laws of lazy prefill: where nothing is pruned it is the full pass; what it prunes and revives is what
a slow, plain reference does; a token runs through a layer at most once; company and drafts change nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import outsize
from outsize.draft.drafter import Draft, Drafter, NoDraft
from outsize.draft.verify import verify
from outsize.engine import decode as flow
from outsize.engine.batch import Batch
from outsize.engine.drive import drive
from outsize.engine.model import Model
from outsize.engine.pace import Pace
from outsize.engine.prefixes import Prefixes
from outsize.errors import OptionError, ReadError
from outsize.forward.full import full
from outsize.forward.lazy import lazy
from outsize.forward.prune import Prune, parse_prefill
from outsize.forward.span import Span
from outsize.kv.int8 import Int8KV, decode
from outsize.kv.kv import KV
from outsize.model.paged import PagedLayer
from outsize.options import Options
from outsize.sampling.sample import greedy
from tests.drafts import write_peft
from tests.golden import tiny
from tests.laws.test_batch import CHUNK, chunked, options, outcome, prompt, run
from tests.lazy_reference import Reference

PROMPT, NEXT = tiny.TOKENS, [(31 * j + 5) % tiny.VOCAB for j in range(8)]
HALF = Prune(keep=(0.6, 0.3), after=(0.3, 0.67))
SETTINGS = {
    "revive": Prune((0.6, 0.3), (0.3, 0.67), "revive"),
    "once": HALF,
    "drop": Prune((0.6, 0.3), (0.3, 0.67), "drop"),
    "window": Prune((0.5, 0.25), (0.3, 0.67), "revive", window=4),
    "layers": Prune((0.3,), (0.67,), "revive", layers=2),
    "mass": Prune(after=(0.3, 0.67), mode="revive", mass=0.7),
}


def away(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def check_depths(kv: KV, num_layers: int, length: int) -> None:
    """A layer has entries of the tokens that have been through it, and no others."""
    depth = dict.fromkeys(range(length), num_layers)
    for pruned in kv.pruned:
        depth |= dict(zip(pruned.tokens.tolist(), pruned.depth.tolist(), strict=True))
    for layer, kept in enumerate(kv.positions):
        assert list(kept) == [p for p in range(length) if depth[p] > layer]


# Not of models whose layers read their tokens: lazy prefill is refused there (tests/laws/test_memory.py).
WHOLE = (*tiny.READS_TOKENS, *tiny.STATEFUL)
LAZY = [f for f in tiny.CONFIGS if f not in WHOLE]
# The blocks that few families have, in one way; the others are slow.
WAYS = [
    pytest.param(how, f, marks=pytest.mark.slow if f in tiny.STORED and how != "revive" else ())
    for how in SETTINGS
    for f in LAZY
]


@pytest.mark.parametrize(("how", "family"), WAYS)
def test_pruning_and_reviving_equal_the_plain_way(
    how: str, family: str, open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    t, prune = open_tiny(family, "fp32").transformer, SETTINGS[how]
    reference, kv, placed = Reference(t, prune), t.new_kv(), set[tuple[int, int]]()
    place = KV.place

    def counting(self: KV, layer: int, positions: list[int], beyond: int = 0) -> object:
        new = {(layer, p) for p in positions}
        assert not new & placed, "computed before"
        placed.update(new)
        return place(self, layer, positions, beyond)

    monkeypatch.setattr(KV, "place", counting)
    (out,) = lazy(t, [Span(0, PROMPT, prune=prune)], [kv])
    assert away(out.logits_KV[0], reference.step(PROMPT, True)) < 1e-5
    first = len(placed)
    assert first < t.description.num_layers * len(PROMPT)
    for j, token in enumerate(NEXT):
        (out,) = lazy(t, [Span(len(PROMPT) + j, [token], prune=prune)], [kv])
        assert away(out.logits_KV[0], reference.step([token], False)) < 1e-5
        if how != "drop":
            check_depths(kv, t.description.num_layers, len(PROMPT) + j + 1)
    assert len(placed) == reference.computed
    revived = len(placed) - first - t.description.num_layers * len(NEXT)
    if family != "mistral":  # whose layers see 8 tokens, which all went on
        assert (revived > 0) == (prune.mode == "revive")


@pytest.mark.parametrize(
    ("encoding", "family"),
    [
        pytest.param(e, f, marks=pytest.mark.slow if f in tiny.STORED and e == "int8" else ())
        for e in ("int8", "fp32")
        for f in LAZY
    ],
)
def test_where_nothing_is_pruned_it_is_the_full_pass(
    family: str, encoding: str, open_tiny: Callable[..., Model]
) -> None:
    t = open_tiny(family, encoding).transformer
    for keep in (1.0, 0.999):  # of so few tokens, all go on; the second looks at attention
        prune, kvs = Prune((keep,) * 2, (0.3, 0.67), "revive"), (t.new_kv(), t.new_kv())
        for start, tokens in ((0, PROMPT), (40, NEXT[:1]), (41, NEXT[1:4]), (44, PROMPT[:30])):
            (ours,) = lazy(t, [Span(start, tokens, prune=prune)], kvs[:1])
            (theirs,) = full(t, [Span(start, tokens)], kvs[1:])
            assert torch.equal(ours.logits_KV, theirs.logits_KV)
        for layer in range(t.description.num_layers):
            assert torch.equal(kvs[0].view(layer), kvs[1].view(layer))


@pytest.mark.parametrize("mode", ["revive", "once", "drop"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_company_changes_no_bit(family: str, mode: str, open_tiny: Callable[..., Model]) -> None:
    """Alone, with other lazy requests and full ones, late, sliced (which a lazy prompt never is)."""
    how = (
        f"lazy:keep=.6/.3,after=.3/.67,mode={mode},score=last"  # 16 rows of 40 would all be revived
    )
    with chunked(open_tiny(family, "int8")) as model:
        asked = [options(i).with_changes({"prefill": how if i % 3 else "full"}) for i in range(7)]
        prompts = [prompt(i, n) for i, n in enumerate((70, 90, 40, 64, 65, 100, 17))]
        wanted = []
        for ids, one in zip(prompts, asked, strict=True):
            request = model.start(ids, one)
            run(Batch(model.scheduler), {0: [request]})
            wanted.append(outcome(request))
        requests = [model.start(ids, one) for ids, one in zip(prompts, asked, strict=True)]
        assert [r.is_lazy for r in requests] == [i % 3 > 0 for i in range(7)]
        slow, model.scheduler.prefixes = Pace(token_s=1.0, step_s=0.0), Prefixes(CHUNK)
        arrivals = {0: requests[:2], 1: requests[2:3], 4: requests[3:5], 9: requests[5:]}
        run(Batch(model.scheduler, streams=5, pace=slow), arrivals)
        assert [outcome(r) for r in requests] == wanted
        assert all(0.3 < r.computed < 1 for r in requests if r.is_lazy)
        again = [model.start(prompts[i], asked[i]) for i in (1, 2)]  # what others kept is not taken
        run(Batch(model.scheduler), {0: again})
        assert [outcome(r) for r in again] == wanted[1:3]
        assert [r.cached for r in again] == [0, 0]


@pytest.mark.parametrize("mode", ["once", "drop"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_drafts_change_no_token(family: str, mode: str, open_tiny: Callable[..., Model]) -> None:
    """Drafts of which some are right: their rows are rows like others, those rejected are forgotten."""
    model = open_tiny(family, "int8")
    t, ids = model.transformer, prompt(3, 60)
    prune = Prune((0.6, 0.3), (0.3, 0.67), mode)

    def answer(drafter: Drafter) -> tuple[list[int], list[list[int]]]:
        seq, kv = flow.Sequence(list(ids), 60, 90, frozenset(), prune=prune), t.new_kv()
        life = flow.decode(seq, (drafter, verify), greedy)
        for _ in drive(t, [life], [kv], forward=lazy):
            pass
        kv.truncate(89)
        return seq.tokens, [list(kept) for kept in kv.positions]

    plain = answer(NoDraft())
    random = torch.Generator().manual_seed(1)

    class Half(NoDraft):
        def propose(self, tokens: Sequence[int], most: int) -> Draft:
            right = plain[0][len(tokens) : len(tokens) + min(3, most)]
            wrong = torch.rand(len(right), generator=random) < 0.3
            return Draft(tuple(7 if w else r for w, r in zip(wrong, right, strict=True)))

    assert answer(Half()) == plain


def test_reviving_takes_no_drafts(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny("llama")
    request = model.start(prompt(1, 40), Options(seed=1, prefill="lazy:fast,mode=revive"))
    model.scheduler.flow(request).close()
    run(Batch(model.scheduler), {0: [request]})
    assert request.drafts.drafted == 0
    with pytest.raises(OptionError, match="draft=ngram guesses several; use mode=once"):
        Prune(mode="revive").check_drafts("ngram")


@pytest.mark.parametrize("mode", ["revive", "once", "drop"])
def test_put_aside_and_brought_back(mode: str, open_tiny: Callable[..., Model]) -> None:
    """Hidden states go to the file, too, and come back bit by bit."""
    t, prune = open_tiny("llama", "int8").transformer, Prune((0.6, 0.3), (0.3, 0.67), mode)
    kvs = t.new_kv(), t.new_kv()
    for kv in kvs:
        lazy(t, [Span(0, PROMPT, prune=prune)], [kv])
    file = io.BytesIO()
    kvs[1].write(file)
    assert kvs[1].nbytes == 0
    assert all(pruned.states_PD is None for pruned in kvs[1].pruned)
    file.seek(0)
    kvs[1].read(file, 64)
    for j, token in enumerate(NEXT):
        outs = [lazy(t, [Span(40 + j, [token], prune=prune)], [kv])[0] for kv in kvs]
        assert torch.equal(outs[0].logits_KV, outs[1].logits_KV)
    with pytest.raises(ReadError, match="shorter than it was"):
        kvs[1].read(io.BytesIO(file.getvalue()[:-1]), 64)


@pytest.mark.parametrize("mode", ["revive", "once", "drop"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "olmoe"])
@pytest.mark.parametrize("chunk", [8, 512])
def test_a_second_long_turn(
    family: str,
    mode: str,
    chunk: int,
    open_tiny: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cache cut back within the prompt, and another long span behind it: as the plain way."""
    t, prune = open_tiny(family, "fp32").transformer, Prune((0.6, 0.3), (0.3, 0.67), mode)
    monkeypatch.setattr(t, "chunk", chunk)
    reference, kv = Reference(t, prune), t.new_kv()
    for start, tokens in ((0, PROMPT), (40, NEXT[:1]), (41, PROMPT[5:35]), (71, NEXT[1:2])):
        (out,) = lazy(t, [Span(start, tokens, prune=prune)], [kv])
        wide = len(tokens) > 16
        assert away(out.logits_KV[0], reference.step(tokens, wide)) < 1e-5
    if mode != "drop":
        check_depths(kv, t.description.num_layers, 72)
    lazy(t, [Span(20, NEXT[:1], prune=prune)], [kv])
    assert kv.length == 21
    if mode != "drop":
        check_depths(kv, t.description.num_layers, 21)


def test_a_step_that_was_broken_off_leaves_nothing_to_go_on_from(
    open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = open_tiny("llama", "int8"), "a long story of one two three " * 4
    how = {"prefill": "lazy:keep=.6/.3,after=.3/.67,mode=revive", "max_tokens": 6}
    talk, twin = model.conversation(**how), model.conversation(**how)  # type: ignore[arg-type]
    for chat in (talk, twin):
        assert "".join(chat.say(text)) is not None
    place, calls = KV.place, [0]

    def breaking(self: KV, *rest: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return place(self, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(KV, "place", breaking)
        with pytest.raises(KeyboardInterrupt):
            list(talk.say(text))
    twin.reset()
    talk.reset()
    assert list(talk.say("and " + text)) == list(twin.say("and " + text))
    assert talk.reply.reused_tokens == 0


def test_other_ways_with_a_prompt_are_not_mixed(open_tiny: Callable[..., Model]) -> None:
    """A chat that turns lazy, or full again, goes on from nothing that was computed the other way."""
    model, text = open_tiny("llama", "int8"), "a long story of one two three " * 4
    talk = model.conversation(max_tokens=4, prefill="lazy:fast")
    list(talk.say(text))
    assert talk.reply.lossy
    assert talk.reply.computed_share < 1
    talk.options = talk.options.with_changes({"prefill": "full"})
    list(talk.say("more"))
    assert talk.reply.reused_tokens == 0
    assert (talk.reply.lossy, talk.reply.computed_share) == (False, 1.0)
    exact = model.conversation(max_tokens=4)
    exact.messages = talk.messages[:-2]
    assert "".join(exact.say("more")) == talk.messages[-1]["content"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quick", "known are full, lazy"),
        ("lazy:", "known are full, lazy"),
        ("full:fast", "known are full, lazy"),
        ("lazy:fats", "did you mean 'fast'"),
        ("lazy:keep", "'keep' is not known"),
        ("lazy:keep=.5,keep=.5", "keep is given twice"),
        ("lazy:keep=1.5/.5/.1", "shares above 0 and up to 1"),
        ("lazy:keep=0/0/0", "shares above 0 and up to 1"),
        ("lazy:keep=nan/.5/.1", "shares above 0 and up to 1"),
        ("lazy:keep=a/b/c", "shares above 0 and up to 1"),
        ("lazy:keep=.2/.5/.6", "give shares that fall"),
        ("lazy:keep=.5", "keep has 1 shares and after has 3"),
        ("lazy:after=.5/.3/.7", "shares of the layers that rise"),
        ("lazy:mode=twice", "mode 'twice' is not known; known are revive, once, drop"),
        ("lazy:mass=.9/.8", "shares above 0 and up to 1"),
        ("lazy:mass=.9,keep=.5/.3/.1", "give one of them"),
        ("lazy:score=first", "score 'first' is not known; known are last, window, layers"),
        ("lazy:score=window:0", "a whole number from 1 to 64"),
        ("lazy:score=window", "a whole number from 1 to 64"),
        ("lazy:score=last:2", "last takes no number"),
    ],
)
def test_what_cannot_be_is_refused(text: str, said: str, open_tiny: Callable[..., Model]) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        parse_prefill(text)
    with pytest.raises(OptionError, match=re.escape(said)):
        open_tiny("llama").generate("a", prefill=text, raw=True)
    with pytest.raises(OptionError, match=re.escape(said)):
        outsize.load("nowhere", prefill=text)


def test_the_settings_that_are_understood() -> None:
    assert parse_prefill("full") is None
    made = parse_prefill("lazy:fast,keep=.9/.5/.1,after=.2/.4/.6,mode=drop,score=window:8")
    assert made == Prune((0.9, 0.5, 0.1), (0.2, 0.4, 0.6), "drop", window=8)
    mass = parse_prefill("lazy:mass=.95,after=.5,score=layers:3")
    assert mass is not None
    assert (mass.mass, mass.after, mass.layers) == (0.95, (0.5,), 3)
    assert mass.points(24) == {12: 0.95}
    assert Prune((0.5, 0.25, 0.1), (0.1, 0.2, 0.99)).points(3) == {1: 0.25, 2: 0.1}
    with pytest.raises(OptionError, match="prunes between layers, and this model has 1"):
        Prune().points(1)


@pytest.mark.parametrize("mode", ["revive", "once", "drop"])
def test_replies_put_aside_go_on_as_they_would_have(
    mode: str, open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"prefill": f"lazy:keep=.6/.3,after=.3/.67,mode={mode}"}
    with chunked(open_tiny("llama", "int8")) as model:
        asked = [options(i).with_changes(how) for i in range(3)]
        prompts, wanted = [prompt(i, n) for i, n in enumerate((50, 40, 45))], []
        for ids, one in zip(prompts, asked, strict=True):
            wanted.append(model.start(ids, one))
            run(Batch(model.scheduler), {0: wanted[-1:]})
        monkeypatch.setattr("outsize.engine.batch.GRAIN", 2)
        monkeypatch.setattr(Batch, "room", 112)
        requests = [model.start(ids, one) for ids, one in zip(prompts, asked, strict=True)]
        batch, aside = Batch(model.scheduler), 0
        for request in requests:
            batch.add(request)
        while ran := batch.step():
            aside += any(live.swapped is not None for live in batch.waiting)
            for request in ran:
                request.advance(0.0)
        assert aside
        assert list(map(outcome, requests)) == list(map(outcome, wanted))


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmoe", "gpt_oss"])
def test_weights_are_fetched_once_a_step(
    family: str,
    open_paged: Callable[..., Model],
    open_tiny: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lazy and full spans share a pass over the layers; weights from disk give the bits of resident ones."""
    prune = Prune((0.6, 0.3), (0.3, 0.67), "revive")
    lengths = ((40, prune), (30, None), (6, prune))
    outs, calls, run_layer = list[torch.Tensor](), [0], PagedLayer.__call__

    def counting(self: PagedLayer, chunks: Any) -> None:
        calls[0] += 1
        run_layer(self, chunks)

    monkeypatch.setattr(PagedLayer, "__call__", counting)
    for model in (open_tiny(family), open_paged(family, "none")):
        t = model.transformer
        kvs, found, calls[0] = [t.new_kv() for _ in lengths], [], 0
        for j in range(4):
            spans = [
                Span(n + j - 1, [NEXT[j]], prune=p) if j else Span(0, PROMPT[:n], prune=p)
                for n, p in lengths
            ]
            found += lazy(t, spans, kvs)
        assert calls[0] == 4 * 2 * t.description.num_layers
        outs.append(torch.cat([out.logits_KV for out in found]))
    assert torch.equal(outs[0], outs[1])


def test_an_adapter_is_on_in_all_rows(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    """Of a step that prunes: as the full pass where all go on, and another answer than without it."""
    model, how = open_tiny("llama", "int8"), "lazy:keep=.999/.999,after=.3/.67,mode=revive"
    model.load_adapter("other", write_peft(model, tmp_path / "lora", 3))
    said = {}
    for name, adapter in (("with", "other"), ("without", None)):
        for prefill in ("full", how, "lazy:keep=.6/.3,after=.3/.67,mode=revive"):
            request = model.start(prompt(1, 60), Options(seed=1, max_tokens=9, logprobs=2,
                                  prefill=prefill, adapter=adapter, ignore_eos=True))  # fmt: skip
            run(Batch(model.scheduler), {0: [request]})
            said[name, prefill] = outcome(request)
        assert said[name, "full"] == said[name, how]
    assert len({str(one) for one in said.values()}) == 4


@pytest.mark.parametrize("native", [True, False])
def test_with_keys_and_values_in_8_bits(native: bool, open_tiny: Callable[..., Model]) -> None:
    """A neutral setting gives the full pass's bits there, too; entries that move take their steps along."""
    t, neutral = open_tiny("llama", "int8", native).transformer, Prune((0.999,), (0.3,), "revive")
    like, kvs = t.new_kv(), [Int8KV(t.new_kv(), decode) for _ in range(3)]
    pruned = SETTINGS["revive"]
    for start, tokens in ((0, PROMPT), *((40 + j, [token]) for j, token in enumerate(NEXT))):
        (ours,) = lazy(t, [Span(start, tokens, prune=neutral)], kvs[:1])
        (theirs,) = full(t, [Span(start, tokens)], kvs[1:2])
        assert torch.equal(ours.logits_KV, theirs.logits_KV)
        (exact,) = lazy(t, [Span(start, tokens, prune=pruned)], [like])
        (lossy,) = lazy(t, [Span(start, tokens, prune=pruned)], kvs[2:])
        assert away(lossy.logits_KV, exact.logits_KV) < 0.4
    check_depths(kvs[2], t.description.num_layers, 48)
