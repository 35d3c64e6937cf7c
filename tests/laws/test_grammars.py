"""Law of grammars: the answer obeys, and is the same with any drafts, alone and in company."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import outsize
from outsize.draft.drafter import Draft, Drafter
from outsize.draft.forced import ForcedDraft
from outsize.draft.load import Drafting
from outsize.draft.spec import parse_draft
from outsize.engine.choosing import chooser
from outsize.engine.decode import Sequence as Tokens
from outsize.engine.model import Model
from outsize.errors import OptionError
from outsize.forward.span import MaskTokens, Out
from outsize.model.lora import Adapter
from outsize.options import Options
from outsize.pack.outline import of_pack
from outsize.plan.fixed import GRAMMARS, grammar_bytes
from outsize.sampling.sample import Sampler

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "größe": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["rot", "grün", "日本"]}, "maxItems": 3},
    },
    "required": ["name", "größe", "tags"],
    "additionalProperties": False,
}
DRAFTS = ("none", "auto", "ngram:k=3")
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7},
    {"temperature": 0.9, "seed": 8, "repeat_penalty": 1.3},
]


@pytest.fixture(scope="module")
def drafting(folder_of: Callable[[str], Path], home: Path) -> Iterator[dict[str, Model]]:
    """A tiny model by what drafts for it: among the drafts, a smaller model's that are drawn."""
    folder = str(folder_of("llama"))
    kinds = [*DRAFTS, f"model:{folder}:k=3,verify=rejection"]
    opened = {k: outsize.load(folder, draft=k, encoding="int8", quiet=True) for k in kinds}
    yield opened
    for model in opened.values():
        model.close()


@pytest.mark.parametrize("way", WAYS, ids=["greedy", "sampled", "penalties"])
def test_drafts_change_nothing(drafting: dict[str, Model], way: dict[str, Any]) -> None:
    prompts = ["Berlin", "a longer prompt: grün rot grün rot", "{"]
    texts = {}
    for kind, model in drafting.items():
        replies = model.generate(prompts, schema=SCHEMA, max_tokens=200, **way)
        texts[kind] = [r.text for r in replies]
        for reply in replies:
            assert set(json.loads(reply.text)) == set(SCHEMA["required"])  # type: ignore[call-overload]
            assert reply.finish == "stop"
        (alone,) = model.generate([prompts[1]], schema=SCHEMA, max_tokens=200, **way)
        assert alone.text == texts[kind][1]
        if kind == "none":
            assert alone.drafted == 0
        else:
            assert alone.accepted >= 25, "what is forced comes several tokens a step"
    assert len({json.dumps(t) for t in texts.values()}) == 1


def test_a_complete_reply_ends_in_the_step_that_completes_it(drafting: dict[str, Model]) -> None:
    """Also at the very last token that it may have, and where no token would end it."""
    for kind in ("none", "auto"):
        for options in ({"max_tokens": 2}, {"max_tokens": 50}, {"ignore_eos": True}):
            (reply,) = drafting[kind].generate("x", grammar='start: "ab"', **options)
            assert (reply.text, reply.finish, reply.new_tokens) == ("ab", "stop", 2)
        (cut,) = drafting[kind].generate("x", grammar='start: "abc"', max_tokens=2)
        assert (cut.text, cut.finish) == ("ab", "length")


def test_a_bias_chooses_among_what_is_allowed(drafting: dict[str, Model]) -> None:
    model = drafting["auto"]
    (comma,) = model.tokens.encode(",")
    said = {
        model.generate("x", grammar='start: "a" | "b"', temperature=1.0, seed=s)[0].text
        for s in range(20)
    }
    assert said == {"a", "b"}
    (reply,) = model.generate("x", grammar='start: "a" | "b"', logit_bias={comma: 100.0})
    assert reply.text in ("a", "b")


def test_a_stop_string_ends_the_text_of_a_schema(drafting: dict[str, Model]) -> None:
    (reply,) = drafting["auto"].generate("x", schema={"const": "abc; def"}, stop=";")
    assert (reply.text, reply.finish) == ('"abc', "stop")


def test_a_bad_schema_is_refused_before_anything_runs(drafting: dict[str, Model]) -> None:
    model = drafting["auto"]
    read = model.bytes_read
    for options in ({"schema": {"type": "hiccup"}}, {"grammar": "start: (("}):
        with pytest.raises(OptionError, match="cannot be used"):
            model.generate("x", **options)  # type: ignore[arg-type]
    assert model.bytes_read == read


class Rule:
    """A constraint that forces some tokens, and then allows even ones."""

    problem = ""

    def __init__(self, forced: Sequence[int]) -> None:
        self.left, self.is_stopped = list(forced), False

    def mask(self, logits_V: torch.Tensor) -> torch.Tensor:
        allowed = [i == self.left[0] if self.left else i % 2 == 0 for i in range(len(logits_V))]
        return logits_V.masked_fill(~torch.tensor(allowed), -torch.inf)

    def advance(self, token: int) -> None:
        if self.left:
            assert token == self.left.pop(0)

    def forced(self) -> list[int]:
        return self.left

    def fitting(self, tokens: Sequence[int]) -> int:
        return next((i for i, t in enumerate(tokens) if t % 2), len(tokens))


class Inner(Drafter):
    """Drafts the same each time, and notes what it is asked and shown."""

    def __init__(self, draft: Draft) -> None:
        self.draft, self.calls = draft, list[str]()

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        self.calls.append("propose")
        return self.draft

    def observe(self, draft: Draft, kept: Sequence[int], out: Out) -> None:
        self.calls.append("observe")

    def skip(self) -> None:
        self.calls.append("skip")

    def close(self) -> None:
        self.calls.append("close")


def test_forced_tokens_are_drafted_and_other_drafts_cut() -> None:
    rows = torch.zeros(2, 4)
    masks = MaskTokens((0, 1, 2, 3, 4), rows, cast("Adapter", None))
    inner, rule = Inner(Draft((2, 4, 5, 6), masks)), Rule([9, 8, 7])
    drafter, out = ForcedDraft(rule, inner), Out(torch.zeros(1, 10))
    assert drafter.propose([1], 2) == Draft((9, 8))
    drafter.observe(Draft((9, 8)), [9, 8, 7], out)
    rule.left = []
    assert drafter.propose([1, 9, 8, 7], 9) == Draft(
        (2, 4), MaskTokens((0, 1, 2), rows, masks.adapter)
    )
    drafter.observe(Draft((2, 4)), [2], out)
    inner.draft = Draft((1,), MaskTokens((1,), rows, masks.adapter))
    assert drafter.propose([1, 9, 8, 7, 2], 9) == Draft()
    inner.draft = Draft()
    assert drafter.propose([1, 9, 8, 7, 2], 9) == Draft()
    drafter.close()
    assert inner.calls == ["skip", "propose", "observe", "propose", "propose", "close"]


def test_a_chooser_is_a_sampler_a_drafter_and_a_check() -> None:
    options, rule = Options(seed=1), Rule([3])
    plain = chooser(options, Drafting(parse_draft("ngram:k=2")))
    assert not isinstance(plain.drafts[0], ForcedDraft)
    made = chooser(options, Drafting(parse_draft("ngram:k=2")), rule)
    assert isinstance(made.drafts[0], ForcedDraft)
    none = chooser(options, Drafting(parse_draft("none")), rule)
    assert not isinstance(none.drafts[0], ForcedDraft)
    assert made.sampler(torch.arange(10.0), [1]) == 3  # forced, and the rule goes on
    assert made.sampler(torch.arange(10.0), [1, 3]) == 8


def test_a_sequence_ends_where_its_rule_does() -> None:
    for kept, stopped, problem, finish, tokens in (
        ([5, 6], True, "", "stop", [5, 6]),
        ([5, 6], True, "too large", "length", [5, 6]),
        ([5, 6], False, "", None, [5, 6]),
        ([5, 6, 7, 8], True, "", "length", [5, 6, 7]),  # complete beyond the limit
        ([5, 6, 7], True, "", "stop", [5, 6, 7]),  # and at it
        ([5, 0], True, "", "stop", [5]),
    ):
        rule = Rule([])
        rule.is_stopped, rule.problem = stopped, problem
        seq = Tokens([1], 1, 4, frozenset({0}), constraint=rule)
        seq.extend(list(kept))
        assert (seq.finish, seq.new_tokens) == (finish, tokens)


def test_a_plan_has_room_for_grammars_where_they_are_wanted(
    folder_of: Callable[[str], Path],
) -> None:
    folder = str(folder_of("llama"))
    with outsize.load(folder, quiet=True) as without:
        assert GRAMMARS not in without.placement.fixed
    with outsize.load(folder, quiet=True, grammars=True, streams=3) as model:
        outline = of_pack(model.pack)
        of_one = grammar_bytes(outline)
        assert model.placement.fixed[GRAMMARS] == of_one + 3 * 1_200_000


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((50,), -torch.inf)
    logits[[3, 7]] = torch.tensor([1.0, 0.5])
    for options in (
        Options(temperature=5.0, top_k=0, top_p=1.0, min_p=0.0),
        Options(temperature=0.1),
    ):
        found = Sampler(options, 1).probs(logits, [])
        assert set(found.ids.tolist()) <= {3, 7}
