"""Drafters one by one, what drafting says of itself, and what it refuses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import outsize
from outsize.bench import speculate
from outsize.checkpoint import lora as adapters
from outsize.draft import mtp_file
from outsize.draft.auto import AutoDraft
from outsize.draft.drafter import Company, Draft
from outsize.draft.mtp import MtpModel, Prediction
from outsize.draft.ngram import FURTHEST, MOST_TOKENS, Index, Match
from outsize.draft.spec import parse_draft
from outsize.draft.stats import DraftStats
from outsize.draft.step_time import ExpertUnion, StepTimes
from outsize.engine.model import Model
from outsize.errors import AdapterError, OptionError
from outsize.forward.span import MaskTokens, Out
from outsize.model.lora import Adapter
from outsize.pack.outline import of_pack
from tests.drafts import write_masks


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 6))
def test_a_match_is_what_followed_the_longest_agreement(text: list[int], most: int) -> None:
    index = Index()
    for end in range(1, len(text) + 1):
        index.extend(text[:end])
    match = index.match(most)
    assert match.length == furthest(text)
    if match.length:
        place = next(
            p for p in range(len(text) - 1, 0, -1)
            if text[max(0, p - match.length) : p] == text[-match.length :]
            and text[p] == match.tokens[0]
        )  # fmt: skip
        assert len(match.tokens) == most
        assert place < len(text)
    else:
        assert text[-1] not in text[:-1]


def furthest(text: list[int]) -> int:
    """Tokens that the best earlier place agrees on, brute force."""
    best = 0
    for place in range(1, len(text)):
        count = 0
        while count < min(place, FURTHEST) and text[place - 1 - count] == text[-1 - count]:
            count += 1
        best = max(best, count)
    return best


def test_a_text_that_repeats_is_continued_beyond_its_end() -> None:
    index = Index()
    index.extend([1, 2, 3, 1, 2, 3, 1, 2, 3])
    assert index.match(7).tokens == (1, 2, 3, 1, 2, 3, 1)


def test_a_long_match_is_found_behind_many_short_ones() -> None:
    """23 tokens that agree, then three of them again and again: the long match is continued."""
    passage = list(range(100, 123))
    short = [token for i in range(40) for token in (*passage[-3:], 900 + i)]
    index = Index()
    index.extend([*passage, 555, *short, *passage])
    match = index.match(1)
    assert (match.tokens, match.length) == ((555,), 23)


def test_a_match_takes_bounded_time_and_memory() -> None:
    """However often a run comes again: the same token, or a run that is nowhere longer."""
    index = Index()
    index.extend([7] * 5000)
    assert index.match(2) == Match((7, 7), FURTHEST)
    common = Index()
    common.extend([token for i in range(20_000) for token in (1, 2, 3, 10 + i)] + [1, 2, 3])
    started = time.process_time()
    for _ in range(10):
        assert common.match(1).length == 3
    assert (time.process_time() - started) / 10 < 0.02
    assert sum(len(latest) for latest in common._latest) <= 3 * MOST_TOKENS


def test_what_bad_guesses_lose_is_bounded() -> None:
    """Guesses that are always wrong, each of which costs a whole step though the pace does not see it
    coming: a reply loses 3 % of its time, and a step or two to find out."""
    draft_stats = DraftStats()
    draft_stats.step_times = Costs(0.01, 0.0)  # promises that rows cost nothing
    drafter, text, seconds = AutoDraft(draft_stats), [1, 2, 3, 1, 2, 3], 0.0
    for i in range(400):
        draft = drafter.propose(text, 8)
        took = 0.02 if draft.tokens else 0.01
        seconds += took
        draft_stats.step_times.last_s = took
        new = text[-3] if not draft.tokens else 1000 + i % 7
        drafter.observe(draft, [new], Out(torch.zeros(1, 9), None))
        text.append(new)
    assert seconds / (400 * 0.01) < 1.035 + 0.01


def test_good_guesses_are_never_bounded() -> None:
    draft_stats = DraftStats()
    draft_stats.step_times = Costs(0.01, 0.001)
    drafter, text, drafted = AutoDraft(draft_stats), [1, 2, 3, 1, 2, 3], 0
    for _ in range(50):
        draft = drafter.propose(text, 3)
        draft_stats.step_times.last_s = 0.01 + 0.001 * len(draft.tokens)
        kept = [text[-3], text[-2], text[-1], text[-3]][: len(draft.tokens) + 1]
        drafted += bool(draft.tokens)
        drafter.observe(draft, kept, Out(torch.zeros(4, 9), None))
        text.extend(kept)
    assert drafted > 45


def test_a_step_of_experts_costs_what_its_rows_choose_together() -> None:
    """64 experts, 8 chosen: rows that choose alike cost nothing more, rows that choose for themselves
    nearly a step each."""
    alike, apart = StepTimes(ExpertUnion(64, 8)), StepTimes(ExpertUnion(64, 8))
    for i in range(200):
        rows = 1 + i % 4
        alike.step(rows, False, 0.01, 0.008, 80)
        asked = round(80 * 8 * (1 - (7 / 8) ** rows))
        seconds = 0.01 * asked / 80
        apart.step(rows, False, seconds, 0.8 * seconds, asked)
    assert alike.seconds(4) / alike.seconds(1) == pytest.approx(1.0, abs=0.1)
    assert apart.seconds(4) / apart.seconds(1) == pytest.approx(3.3, rel=0.1)
    assert apart.seconds(9) / apart.seconds(1) == pytest.approx(5.6, rel=0.15)


def test_pace_learns_what_rows_cost_and_what_reading_hides() -> None:
    resident, streamed = StepTimes(), StepTimes()
    for i in range(120):
        rows = 1 + i % 9
        computing = 0.004 + 0.001 * rows
        resident.step(rows, False, computing, 0.0)
        streamed.step(rows, False, 0.05 + 0.25 * computing, 0.05 - 0.75 * computing)
    assert resident.seconds(9) / resident.seconds(1) == pytest.approx(13 / 5, rel=0.15)
    assert streamed.seconds(9) / streamed.seconds(1) == pytest.approx(1.0, abs=0.1)


def test_pace_foresees_more_rows_than_it_has_seen() -> None:
    """A first step that was cold, then steps with masks that wait for the disk: what more rows would take
    is what they take, not what a slow start, or a plane whose masks came out below nothing, makes of it."""
    pace = StepTimes()

    def step(rows: int, masked: bool, slower: float = 1.0) -> None:
        computing = slower * (0.005 + 0.0009 * rows + (0.001 if masked else 0.0))
        seconds = max(computing, slower * 0.022)
        pace.step(rows, masked, seconds, seconds - computing)

    step(2, False, slower=3.0)
    for i in range(40):
        step(3 + i % 3, True, slower=1.0 + 0.1 * (i % 2))
    assert pace.seconds(9, True) == pytest.approx(0.024, rel=0.1)
    for _ in range(40):
        step(25, True)
    assert pace.seconds(25, True) == pytest.approx(0.0285, rel=0.1)
    assert pace.seconds(4, True) == pytest.approx(0.022, rel=0.15)


def test_auto_drafts_where_reading_rules_and_not_where_guesses_fail() -> None:
    draft_stats = DraftStats()
    pace = draft_stats.step_times
    for _ in range(60):
        pace.step(1, False, 0.05, 0.045)
        pace.step(9, False, 0.05, 0.035)
    drafter, text = AutoDraft(draft_stats), [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    assert drafter.propose(text, 8).tokens[:2] == (5, 6)
    slow = DraftStats()
    for rows in [1, 9] * 60:
        slow.step_times.step(rows, False, 0.01 * rows, 0.0)
    never = AutoDraft(slow)
    assert not never.propose([5, 1, 7, 5], 8).tokens


class Foreseen:
    """A mask drafter that knows what it will say."""

    k = 2

    def __init__(self, *chances: float) -> None:
        self._ready = tuple(Prediction(7, chance) for chance in chances)

    def masks(self, anchors: tuple[int, ...], depth: int) -> MaskTokens:
        return MaskTokens(anchors, torch.zeros(depth, 1), cast(Adapter, None))

    def predict(self, states_KD: Tensor, last: int) -> tuple[Prediction, ...]:
        return self._ready


def after_a_step(pace: StepTimes, *chances: float) -> Draft:
    """What is drafted where masks have just made guesses of these chances."""
    draft_stats = DraftStats(cast(MtpModel, Foreseen(*chances)))
    draft_stats.step_times = pace
    drafter = AutoDraft(draft_stats)
    drafter.observe(drafter.propose([1, 2, 3], 8), [4], Out(torch.zeros(1, 9), torch.zeros(2, 1)))
    return drafter.propose([1, 2, 3, 4], 8)


class Costs(StepTimes):
    """Steps of a time by rows."""

    def __init__(self, base: float, row: float) -> None:
        super().__init__()
        self._base, self._row = base, row

    def seconds(self, rows: float, masked: bool = False) -> float:
        return self._base + self._row * rows


def test_drafts_leave_the_steps_of_others_short() -> None:
    """Where a step is shared and to stay even, all who share it may draft as much as stretches it so far."""
    stats, company = DraftStats(), Company(others=3)
    for _ in range(50):
        for rows in (4, 8, 16):
            stats.step_times.step(rows, False, 0.010 + 0.001 * rows, 0.0)
    drafter, text = AutoDraft(stats, company), [*range(30), *range(30)]
    company.stretch = None
    free = len(drafter.propose(text, 15).tokens)
    company.stretch = 1.6
    even = len(drafter.propose(text, 15).tokens)
    assert free > 10
    assert even == 2, "1.6 times 14 ms are 22.4: twelve rows, three for each of four"
    company.meets(3, joining=True)
    assert len(drafter.propose(text, 15).tokens) == 3, "beside prompts all four draft what one may"
    company.meets(0, joining=True)
    assert len(drafter.propose(text, 15).tokens) > 10, "alone it makes nobody wait"


def test_what_a_step_brings_others_is_forgotten_with_them() -> None:
    company = Company()
    company.meets(3, joining=False)
    company.saw(8)
    assert company.tokens == 6.0, "eight tokens of four, three of them others"
    company.meets(7, joining=True)
    assert (company.others, company.joining, company.tokens) == (7, True, 7.0)


def test_masks_go_where_a_step_may_end() -> None:
    """The surer a guess, the less its anchor is worth masks; rows that cost nothing go everywhere, rows that
    cost much nowhere; and a guess that will hardly be right is not checked."""
    free, dear = Costs(0.02, 0.0), Costs(0.001, 0.02)
    some = Costs(0.02, 0.001)
    assert after_a_step(free, 0.9, 0.4).masks.anchors == (0, 1, 2)  # type: ignore[union-attr]
    assert after_a_step(some, 0.99, 0.99).masks.anchors == (2,)  # type: ignore[union-attr]
    assert after_a_step(some, 0.99, 0.4).masks.anchors == (1, 2)  # type: ignore[union-attr]
    assert after_a_step(dear, 0.9, 0.9) == Draft()
    assert len(after_a_step(some, 0.99, 0.1).tokens) < len(after_a_step(some, 0.99, 0.99).tokens)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fast", "known are auto, none, ngram"), ("ngram:k=0", "from 1 to 15"),
        ("ngram:k=99", "from 1 to 15"), ("ngram:width=3", "ngram takes k"), ("mtp", "a path"),
        ("masks", "a path, as in mtp:FILE"),
        ("none:k=2", "none takes nothing"), ("ngram:file", "no path"),
        ("masks:f.safetensors:layout=cubic", "known are quadratic, linear"),
        ("model:m:verify=hope", "verify is hope; known are pick, rejection"),
        ("ngram:verify=rejection", "ngram takes k"),
    ],
)  # fmt: skip
def test_specs_that_are_not(spec: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse_draft(spec)


def test_specs_that_are() -> None:
    assert parse_draft("ngram:k=8").k == 8
    masks = parse_draft("mtp:/a/b.safetensors:k=2,layout=linear")
    assert parse_draft("masks:/a/b.safetensors:k=2,layout=linear") == masks
    assert (masks.source, masks.k, masks.layout) == ("/a/b.safetensors", 2, "linear")
    assert parse_draft("model:hf:org/repo:k=3").source == "hf:org/repo"


def test_a_model_that_rejects_its_own_draws_keeps_all(open_tiny: Callable[..., Model]) -> None:
    """p is q, so that min(1, p / q) is 1; greedy answers are those without drafts."""
    path = str(open_tiny("llama", "int8").pack.path)
    spec = f"model:{path}:k=3,verify=rejection"
    with outsize.load(path, draft=spec, quiet=True) as model:
        (drawn,) = model.generate("abab", raw=True, max_tokens=20, temperature=0.9, seed=4)
        assert drawn.drafted == drawn.accepted > 5
        (greedy,) = model.generate("abab", raw=True, max_tokens=20)
        (noted,) = model.generate(
            "abab", raw=True, max_tokens=20, temperature=0.9, seed=4, logprobs=1
        )
        assert len(noted.logprobs) == noted.new_tokens, (
            "drafts are checked by picks, which note them"
        )
    with outsize.load(path, draft="none", quiet=True) as model:
        assert model.generate("abab", raw=True, max_tokens=20)[0].text == greedy.text


def test_mask_drafters_that_do_not_fit(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    model, other = open_tiny("llama", "int8"), open_tiny("qwen2", "int8")
    good = write_masks(model, tmp_path / "good.safetensors")
    foreign = write_masks(other, tmp_path / "foreign.safetensors")
    lora = write_masks(model, tmp_path / "lora.safetensors", kind="lora")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(good.read_bytes()[:500])
    for path, k, words in (
        (foreign, 0, "trained for another model"), (lora, 0, "is no mask-token drafter"),
        (broken, 0, "not a readable safetensors"), (good, 9, "has 3 masks"),
        (tmp_path / "none", 0, "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=words):
            mtp_file.read(path, k, of_pack(model.pack), model.transformer)
    tensors, about = adapters.raw(good)
    assert about["kind"] == "masks"
    assert tensors["masks"].shape[0] == 3


def test_a_draft_model_with_another_tokenizer_is_refused(
    open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_tiny("llama", "int8")
    other = replace(model.pack, tokenizer_crc=model.pack.tokenizer_crc + 1)
    monkeypatch.setattr("outsize.engine.load.draft_pack", lambda *_: other)
    monkeypatch.setattr("outsize.weights.load.load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(AdapterError, match="same tokenizer"):
        outsize.load(str(model.pack.path), draft=f"model:{model.pack.path}", quiet=True)


def test_a_reply_accounts_for_its_drafts(open_tiny: Callable[..., Model]) -> None:
    plain = open_tiny("llama", "int8")
    with outsize.load(str(plain.pack.path), draft="ngram:k=4", quiet=True) as model:
        (reply,) = model.generate("abcabcabc", raw=True, max_tokens=40)
    assert reply.drafted >= reply.accepted
    assert len(reply.accepted_per_position) <= 4
    if reply.drafted:
        assert reply.tokens_per_step > 1 or reply.accepted == 0
    (none,) = plain.generate("abcabcabc", raw=True, max_tokens=40, seed=1)
    assert none.to_json()["step_s"] > 0  # type: ignore[operator]


def test_drafts_are_measured_against_none(
    folder_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole bench, both models in processes of their own: a row for each category, and the mean."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"turns": [f"say {i}"], "category": "ab"[i % 2]} for i in range(3)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    options = speculate.SpeculateOptions(prompts, "ngram", new_tokens=12, context=64, quiet=True)
    speculate.show(str(folder_of("llama")), options, True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["category"], r.get("prompts")) for r in rows] == [("a", 2), ("b", 1), ("mean", None)]
    for row in rows:
        assert not row["void"]
        assert row["ratio"] > 0
        assert (row["given_up_bytes"], row["plain_given_up_bytes"]) == (0, 0)
