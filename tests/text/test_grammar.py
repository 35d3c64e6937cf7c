"""Replies that obey a schema or a grammar: what is allowed token by token, what is refused, what is free."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from outsize.engine.model import Model
from outsize.errors import OptionError, UnsupportedError
from outsize.options import Options
from outsize.text import grammar
from outsize.text.channels import PLAIN, Format, format_of
from outsize.text.grammar import GrammarConstraint, Grammars
from outsize.text.tokens import Tokens
from tests.scripted import byte_tokenizer

SPECIAL = ["<s>", "</s>", "<|im_end|>"]
HARMONY = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|return|>"]


def tokens(special: list[str] | None = None, plain: list[str] | None = None) -> Tokens:
    return Tokens(byte_tokenizer(special or SPECIAL, plain or []), None, False)


def sentencepiece() -> Tokens:
    """A vocabulary of SentencePiece's kind, that puts a space before a text."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *'{}":, abn',
        "na",
    ]
    vocab = {p: i for i, p in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(
        models.BPE(vocab, [("n", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_tokens([AddedToken(t, special=True, normalized=False) for t in pieces[:3]])
    return Tokens(made, None, False)


def rule(t: Tokens, form: Format = PLAIN, **options: Any) -> GrammarConstraint:
    ends = [i for i in [t.control("</s>"), t.control("<|return|>")] if i is not None]
    made = Grammars(t, ends).constraint(Options(**options), form)
    assert made is not None
    return made


def allowed(t: Tokens, constraint: GrammarConstraint) -> list[int]:
    masked = constraint.mask(torch.zeros(t.count))
    return torch.nonzero(masked == 0).flatten().tolist()


def walk(t: Tokens, constraint: GrammarConstraint, text: str) -> bool:
    """May the reply be this text, token by token, and end there?"""
    for token in t.encode(text, special=True):
        if token not in allowed(t, constraint):
            return False
        constraint.advance(token)
    return bool({t.control("</s>"), t.control("<|return|>")} & set(allowed(t, constraint)))


def write(t: Tokens, constraint: GrammarConstraint, seed: int, most: int = 400) -> str:
    """A text by chance among what is allowed."""
    random, ids = torch.Generator().manual_seed(seed), list[int]()
    while not constraint.is_stopped and len(ids) < most:
        masked = constraint.mask(torch.randn(t.count, generator=random))
        token = int(masked.argmax())
        constraint.advance(token)
        if token != t.control("</s>"):
            ids.append(token)
    return t.decode(ids)


PERSON = {
    "type": "object",
    "properties": {
        "größe": {"type": "integer", "minimum": 0, "maximum": 250},
        "名": {"type": "string", "maxLength": 3},
        "stadt": {"enum": ["Zürich", "東京", "Paris 😀", 'a"b\\c', "\u2028"]},
    },
    "required": ["größe", "名", "stadt"],
    "additionalProperties": False,
}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["bytes", "pieces"]))
def test_any_reply_obeys_its_schema(seed: int, kind: str) -> None:
    t = tokens() if kind == "bytes" else sentencepiece()
    said = write(t, rule(t, schema=PERSON), seed)
    found = json.loads(said)  # strict: control characters would be refused
    assert list(found) == ["größe", "名", "stadt"]
    assert 0 <= found["größe"] <= 250
    assert len(found["名"]) <= 3
    assert found["stadt"] in PERSON["properties"]["stadt"]["enum"]  # type: ignore[index]
    assert "\ufffd" not in said


@pytest.mark.parametrize("t", [tokens(), sentencepiece()], ids=["bytes", "pieces"])
def test_constants_are_written_whole(t: Tokens) -> None:
    """Characters of several tokens, and what JSON may escape in several ways."""
    for value in ("日本語😀 é", "e\u0301", {"a": [1, None, True]}, "<s>", "\u00a0", '"\\/\n\t\x01'):
        for seed in range(3):
            said = write(t, rule(t, schema={"const": value}), seed)
            assert json.loads(said) == value
            assert said == json.dumps(value, ensure_ascii=False) or value == '"\\/\n\t\x01'


def test_ends_are_allowed_where_the_grammar_may_end() -> None:
    t = tokens()
    end = t.control("</s>")
    constraint = rule(t, grammar='start: "ab" "c"?')
    for letter in "ab":
        assert allowed(t, constraint) == t.encode(letter)
        constraint.advance(*t.encode(letter))
    assert sorted(allowed(t, constraint)) == sorted([*t.encode("c"), end])
    assert not constraint.is_stopped
    constraint.advance(*t.encode("c"))
    assert constraint.is_stopped
    assert allowed(t, constraint) == [end]
    assert not constraint.problem
    assert list(constraint.forced()) == []
    assert constraint.fitting(t.encode("c")) == 0


def test_an_end_that_is_ignored_is_not_allowed() -> None:
    t = tokens()
    constraint = rule(t, grammar="start: /a*/", ignore_eos=True)
    assert allowed(t, constraint) == t.encode("a")


def test_what_is_forced_is_what_is_allowed() -> None:
    """Asked for or not, so that drafts change nothing."""
    t = tokens()
    asked, silent = (rule(t, schema=PERSON) for _ in range(2))
    wanted = '{"größe": 17, "名": "x", "stadt": "東京"}'
    for token in t.encode(wanted):
        forced, may = list(asked.forced()), allowed(t, asked)
        assert may == allowed(t, silent)
        if forced:
            assert may == forced[:1]
            assert asked.fitting(forced) == len(forced)
        assert asked.fitting([token, t.encode("\x01")[0]]) == 1
        asked.advance(token)
        silent.advance(token)
    assert asked.is_stopped


def test_json_is_spaced_as_pythons() -> None:
    t = tokens()
    value = {"a": [1, 2, {"b": "c"}], "d": None}
    assert walk(t, rule(t, schema={}), json.dumps(value))
    assert walk(t, rule(t, schema=True), json.dumps(value))
    assert walk(t, rule(t, schema={"x-guidance": {"whitespace_flexible": True}}), "[1, 2]")
    for spaced in ("{ ", '{"a":1}', "[1,2]", "\n"):
        assert not walk(t, rule(t, schema={"x-guidance": {"whitespace_flexible": True}}), spaced)


REFUSED = [
    ({"schema": {"type": 123}}, "type must be a string"),
    ({"schema": {"type": "hiccup"}}, "Invalid type: hiccup"),
    ({"schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"schema": {"type": "string", "pattern": "(("}}, "regex parse error"),
    ({"schema": {"type": "string", "format": "frobnicate"}}, "frobnicate"),
    ({"schema": {"$ref": "#"}}, "allows no text"),
    ({"schema": {"$ref": "#/$defs/a"}}, "does not exist"),
    ({"schema": {"$ref": "http://127.0.0.1:1/x"}}, "not present"),
    ({"schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "Unsatisfiable"),
    ({"schema": {"const": float("nan")}}, "not JSON"),
    ({"schema": {"const": "\ud800"}}, "no Unicode"),
    ({"schema": {"const": object()}}, "not JSON"),
    ({"schema": {"enum": ["x" * 300_000]}}, "at most 262,144"),
    ({"schema": {"enum": list(range(30_000))}}, "parts"),
    ({"grammar": ""}, "no start rule"),
    ({"grammar": "start: (("}, "Expected token"),
    ({"grammar": "start: missing"}, "missing"),
    ({"grammar": "start: <|nope|>"}, "unknown special token"),
    ({"grammar": "start: start"}, "allows no text"),
    ({"grammar": 'start: "\ud800"'}, "no Unicode"),
    ({"grammar": "// " + "x" * 300_000}, "at most 262,144"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_is_no_schema_is_refused_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as caught:
        rule(tokens(), **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        made = {"type": "object", "properties": {"a": made}}
    return made


def hostile() -> Iterator[dict[str, Any]]:
    defs = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 10} for i in range(10)}
    yield {"schema": {"$defs": {**defs, "a10": {"type": "integer"}}, "$ref": "#/$defs/a0"}}
    branches = [{"properties": {f"k{i}": {"type": "string"}}} for i in range(6)]
    yield {"schema": {"allOf": [{"anyOf": branches}] * 8}}
    yield {"schema": {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"}}
    yield {"schema": {"type": "string", "pattern": "(.*a){20}.{20}"}}
    yield {"schema": {"type": "array", "items": {}, "minItems": 10**6, "maxItems": 10**9}}
    yield {"schema": {"type": "string", "minLength": 10**9}}
    yield {"schema": {"type": "integer", "multipleOf": 999_983, "minimum": 1, "maximum": 10**18}}
    for count, objects in ((900, 1), (900, 9), (2_000, 1), (200, 40)):
        wide = {"properties": {f"p{i}": {} for i in range(count)}}
        yield {"schema": {"properties": {f"o{i}": wide for i in range(objects)}}}
    yield {"schema": {"enum": [f"value {i}" for i in range(10_000)]}}
    for depth in (100, 400, 5_000):
        yield {"schema": nested(depth)}
    for opening, closing in ("()", "[]"):
        yield {"grammar": "start: " + opening * 100_000 + '"a"' + closing * 100_000}
    yield {"grammar": "start: /" + "(" * 100_000 + "a" + ")" * 100_000 + "/"}
    yield {"grammar": 'start: ("a"{1000}){1000}'}
    yield {"grammar": "start: " + " | ".join(f'"w{i}"' for i in range(12_000))}
    rules = "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(30))
    yield {"grammar": f'start: r0\n{rules}\nr30: "a"'}
    yield {"grammar": 'start: e e e e\ne: "" | e'}


@pytest.mark.parametrize("options", [pytest.param(o, id=str(i)) for i, o in enumerate(hostile())])
def test_no_schema_takes_a_second(options: dict[str, Any]) -> None:
    """Refused, or followed for a few tokens: processor time, the best of three, as other tests run beside."""
    t = tokens()
    times = []
    for _ in range(3):
        began = time.thread_time()
        with suppress(OptionError):
            write(t, rule(t, **options), 1, most=20)
        times.append(time.thread_time() - began)
        if times[-1] < 1:
            return
    raise AssertionError(f"{times} seconds")


def test_a_grammar_that_breaks_down_ends_the_reply(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More states than are followed: the reply is cut, and nothing raised in the middle of a step."""
    monkeypatch.setattr(grammar, "MAX_STATES", 200)
    t = tokens()
    constraint = rule(t, grammar="start: /(.*a){20}.{20}/")
    for token in t.encode("ab" * 500):
        constraint.mask(torch.zeros(t.count))
        constraint.advance(token)
        if constraint.is_stopped:
            break
    assert constraint.is_stopped
    assert constraint.problem
    assert constraint.mask(torch.zeros(t.count)).isfinite().any()
    assert capsys.readouterr().err.count("cannot be followed") == 1


def test_a_vocabulary_of_another_kind_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(UnsupportedError, match="the bytes of this model's tokens are not known"):
        rule(Tokens(words, None, False), schema={})


THINK = ["<think>", "</think>"]


@pytest.mark.parametrize("where", ["plain tokens", "control tokens", "no tokens"])
def test_what_a_model_thinks_is_free(where: str) -> None:
    t = tokens(
        [*SPECIAL, *(THINK if where == "control tokens" else [])],
        THINK if where == "plain tokens" else None,
    )
    form = format_of(t, "{{ '<think>' }}" if where == "no tokens" else None)
    opened = form.after(t, t.encode("<s>user<think>\n", special=True))
    assert opened.opened
    answer = {"schema": {"const": "x"}}
    assert walk(t, rule(t, opened, **answer), 'so { "x" < 日本\n</think>\n\n"x"')
    assert not walk(t, rule(t, opened, **answer), 'so</think>"y"')
    assert not walk(t, rule(t, opened, **answer), '"x"')
    assert walk(t, rule(t, form, **answer), '<think>a</think>"x"')
    assert walk(t, rule(t, form, **answer), '"x"')
    assert not walk(t, rule(t, form, **answer), "well")
    assert walk(t, rule(t, PLAIN, **answer), '"x"')
    whole = 'start: "<think>" "a"' if where == "no tokens" else 'start: <think> "a" </think>'
    said = "<think>a" if where == "no tokens" else "<think>a</think>"
    assert walk(t, rule(t, form, grammar=whole), said)


def test_a_schema_is_of_the_final_channel() -> None:
    t = tokens([*SPECIAL, *HARMONY])
    form = format_of(t, None).after(t, t.encode("<|start|>assistant", special=True))
    answer = {"schema": {"const": "x"}}
    thought = "<|channel|>analysis<|message|>a {<|end|><|start|>assistant"
    for before in ("", thought, thought + thought):
        for format in ("", "<|constrain|>json", " <|constrain|>json"):
            said = f'{before}<|channel|>final{format}<|message|>"x"'
            assert walk(t, rule(t, form, **answer), said)
    for said in ('"x"', '<|channel|>final<|message|>"y"', '<|channel|>commentary<|message|>"x"'):
        assert not walk(t, rule(t, form, **answer), said)


def test_markers_of_tools_are_no_text() -> None:
    """Not in a string of JSON, where they would be read as a call; spelled in pieces they are."""
    t = tokens(plain=["<tool_call>", "</tool_call>", "<table>"])
    mark, table = t.encode("<tool_call>"), t.encode("<table>")
    assert (len(mark), len(table)) == (1, 1)
    constraint = rule(t, schema={"type": "string"})
    constraint.advance(*t.encode('"'))
    assert mark[0] not in allowed(t, constraint)
    assert table[0] in allowed(t, constraint)
    said = write(t, rule(t, schema={"const": "<tool_call><table>"}), 0)
    assert said == '"<tool_call><table>"'
    assert walk(t, rule(t, grammar='start: <tool_call> "x"'), "<tool_call>x")


def test_options_say_what_is_no_schema() -> None:
    for wrong in ([1], "{}", 7, False, {1: 2}):
        with pytest.raises(OptionError, match="a JSON schema as a dict"):
            Options(schema=wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="grammar is 7"):
        Options(grammar=7)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="are both given"):
        Options(schema={}, grammar='start: "a"')


def test_patterns_that_must_hold_together_are_few(open_tiny: Callable[..., Model]) -> None:
    """Each more takes 2.5 times as long to compile: of 28 it would be half an hour."""
    many = [{"pattern": f"^.*a{{{i}}}.*$"} for i in range(2, 30)]
    chain: dict[str, Any] = {
        f"d{i}": {**one, "$ref": f"#/$defs/d{i + 1}"} for i, one in enumerate(many)
    }
    chain[f"d{len(many)}"] = {"type": "string"}
    for schema in ({"allOf": many}, {"$ref": "#/$defs/d0", "$defs": chain}):
        with pytest.raises(OptionError, match="28 patterns and formats"):
            open_tiny().generate("a", schema=schema, max_tokens=5)
    apart = {f"p{i}": {"type": "string", **one} for i, one in enumerate(many)}
    assert open_tiny().generate("a", schema={"properties": apart}, max_tokens=5)
