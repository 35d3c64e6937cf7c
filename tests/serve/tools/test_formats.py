"""Calls of tools, in every format: found by the template, read back however the text comes, and forced."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outsize.errors import OptionError
from outsize.options import Options
from outsize.registry import names
from outsize.serve.ask import AUTO, REQUIRED
from outsize.serve.events import CallArguments, CallStart, Part
from outsize.serve.tools import formats
from outsize.serve.tools.base import CallFormat
from outsize.serve.tools.find import format_of
from outsize.text.channels import Format
from outsize.text.channels import format_of as channels_of
from outsize.text.detokenize import Stream
from outsize.text.grammar import GrammarConstraint, Grammars
from outsize.text.template import Messages, render
from outsize.text.tokens import Tokens
from tests.scripted import byte_tokenizer

# What published templates say of calls, in few words of our own.
TEMPLATES = {
    "hermes": "{% if tools %}<tools></tools> within <tool_call></tool_call> tags{% endif %}",
    "llama3": "<|start_header_id|>{{ tools }} '{\"name\": ' '\"parameters\": ' ipython",
    "mistral": "[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS][ {{ tool_call.function | tojson }} ]",
    "mistral 2025": "[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]{{ name }}[CALL_ID]{{ id }}[ARGS]",
    "harmony": "<|start|>assistant<|channel|>commentary to={{ tools }}<|message|>",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>name\n```json\n",
    "deepseek 3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>name<｜tool▁sep｜>{{ arguments }}",
    "functiongemma": "{{ tools }}<start_function_call>call:name{}<end_function_call>",
    "generic": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
}
MARKS = [
    "<s>", "</s>", "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>", "<start_function_call>", "<end_function_call>", "<escape>",
]  # fmt: skip
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "größe": {"enum": ["°C", "日本😀"]},
            },
            "required": ["city"],
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
TOOLS = (WEATHER, CLOCK)
ARGUMENTS = {"city": 'Zü"r{ich', "größe": "日本😀"}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
# By format: replies as models write them, and the text beside the calls, and the calls.
ONE = [("get_weather", ARGUMENTS)]
TWO = [*ONE, ("clock", {})]
CALLED = f'<tool_call>\n{{"name": "get_weather", "arguments": {TEXT}}}\n</tool_call>'
CLOCKED = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
REPLIES: dict[str, list[tuple[str, str, list[Any]]]] = {
    "hermes": [
        (CALLED, "", ONE),
        (f"I will look.\n{CALLED}\n{CLOCKED}", "I will look.\n", TWO),
        ('\n\n<tool_call>{"arguments": {}, "name":"clock"}', "", TWO[1:]),
        ('<tool_call>{"id": 12, "name": "clock"} </tool_call>', "", TWO[1:]),
        ('<tool_call>{"name": "clock", "arguments": "{}"}</tool_call>', "", TWO[1:]),
        (f'{{"name": "get_weather", "arguments": {TEXT}}}\n', "", ONE),  # as Qwen 2.5 Coder does
        ('{"answer": 42}', '{"answer": 42}', []),
        ('Say {"name": "clock", "arguments": {}}', 'Say {"name": "clock", "arguments": {}}', []),
        ("plain <tool> text", "plain <tool> text", []),
        ("<tool_call>not JSON</tool_call>", "<tool_call>not JSON</tool_call>", []),
        ('<tool_call>{"name": "no_such"}</tool_call>',) * 2 + ([],),
        ('<tool_call>{"name": 3}', '<tool_call>{"name": 3}', []),
        ('<tool_call>{"name": "clock", "arguments": [1]}',) * 2 + ([],),
        (f"<tool_call>oops {CALLED}", "<tool_call>oops ", ONE),
        ("a <tool_ca", "a <tool_ca", []),
        (f'```json\n{{\n  "name": "get_weather",\n  "arguments": {TEXT}\n}}\n```', "", ONE),
        (f'{{"name": "get_weather", "arguments": {TEXT}}}\n{{"name": "clock", "arguments": {{}}}}', "", TWO),
        ('```json\n{"name": "Bob", "arguments": {}}\n```',) * 2 + ([],),
        ('```python\n{"name": "clock", "arguments": {}}\n```',) * 2 + ([],),
        ('{"name": "clock"}',) * 2 + ([],),
        ('Like {"name": "clock", "arguments": {}}',) * 2 + ([],),
        ("``", "``", []),
        ("  \n ", "  \n ", []),
    ],
    "llama3": [
        (f'{{"name": "get_weather", "parameters": {TEXT}}}', "", ONE),
        ('<|python_tag|>{"name": "clock", "parameters": {}}', "", TWO[1:]),
        ('\n{"type": "function", "name": "clock", "parameters": {}}', "", TWO[1:]),
        ('{"answer": 42}', '{"answer": 42}', []),
        ('See {"name": "clock", "parameters": {}}', 'See {"name": "clock", "parameters": {}}', []),
    ],
    "mistral": [
        (f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {TEXT}, "id": "abcdefghi"}}]', "", ONE),
        (
            f'Well.[TOOL_CALLS] [{{"name": "get_weather", "arguments": {TEXT}}}, '
            '{"name": "clock", "arguments": {}}]',
            "Well.",
            TWO,
        ),
        ("[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
    ],
    "mistral 2025": [
        (f"[TOOL_CALLS]get_weather[ARGS]{TEXT}", "", ONE),
        (f"a[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{TEXT}[TOOL_CALLS]clock[ARGS]{{}}", "a", TWO),
        ("[TOOL_CALLS]no_such[ARGS]{}", "[TOOL_CALLS]no_such[ARGS]{}", []),
    ],
    "harmony": [
        (f"<|channel|>commentary to=functions.get_weather<|message|>{TEXT}", "", ONE),
        ("Wait.<|channel|>commentary to=functions.clock<|message|>{}", "Wait.", TWO[1:]),
    ],
    "deepseek": [
        (
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{TEXT}\n```"
            "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{}\n```"
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "",
            TWO,
        ),
    ],
    "deepseek 3.1": [
        (
            f"Well <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{TEXT}"
            "<｜tool▁call▁end｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "Well ",
            TWO,
        ),
        ("<｜tool▁calls▁begin｜>x", "<｜tool▁calls▁begin｜>x", []),
    ],
    "functiongemma": [
        (
            '<start_function_call>call:get_weather{city:<escape>Zü"r{ich<escape>,größe:<escape>日本😀<escape>}'
            "<end_function_call><start_function_call>call:clock{}<end_function_call>",
            "",
            TWO,
        ),
        (
            "<start_function_call>call:clock{a:1.5,b:[1,true,{c:null}],d:word}<end_function_call>",
            "",
            [("clock", {"a": 1.5, "b": [1, True, {"c": None}], "d": "word"})],
        ),
        ("<start_function_call>call:no{}", "<start_function_call>call:no{}", []),
    ],
}  # fmt: skip
REPLIES["generic"] = REPLIES["hermes"]
CASES = [(kind, *case) for kind, cases in REPLIES.items() for case in cases]
KINDS = list(TEMPLATES)


def made(kind: str, knows: bool = True) -> CallFormat:
    found = format_of(TEMPLATES[kind], lambda name: knows)
    assert isinstance(found, CallFormat)
    assert found.name == kind.split()[0]
    return found


def parse(
    form: CallFormat, pieces: Sequence[str], tools: Sequence[Any] = TOOLS
) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of a reply that comes in pieces."""
    parser, text, calls = form.parser(3, tools), "", list[tuple[str, str]]()
    for found in (*(list(parser.push(p)) for p in pieces), list(parser.finish())):
        seen = [(type(e), e.index) for e in found if not isinstance(e, Part)]
        assert len(seen) == len(set(seen)), "of each call at most one piece at once"
        for event in found:
            assert event.choice == 3
            if isinstance(event, Part):
                assert event.text
                text += event.text
            elif isinstance(event, CallStart):
                assert event.index == len(calls)
                assert event.id.startswith("call_")
                assert len(event.id) == 29
                calls.append((event.name, ""))
            else:
                assert event.index == len(calls) - 1
                assert event.text
                calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return text, calls


def test_every_format_is_tried() -> None:
    assert {kind.split()[0] for kind in KINDS} == set(names(formats))
    for kind in KINDS:
        made(kind)
    assert format_of(None, bool).name == "generic"
    for other in ("<tool_call><function=name>", "<tool_call>name<arg_key>"):
        assert format_of(other + "{{ tools }}", bool).name == "generic"


@pytest.mark.parametrize(("kind", "reply", "text", "calls"), CASES)
def test_replies_as_models_write_them(kind: str, reply: str, text: str, calls: list[Any]) -> None:
    said, found = parse(made(kind), [reply])
    assert (said, [(n, json.loads(a)) for n, a in found]) == (text, calls)
    assert parse(made(kind), list(reply)) == (said, found)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CASES), st.randoms())
def test_pieces_change_nothing(
    case: tuple[str, str, str, list[Any]], chance: random.Random
) -> None:
    kind, reply, _, _ = case
    cuts = sorted(chance.sample(range(len(reply) + 1), min(5, len(reply))))
    pieces = [reply[a:b] for a, b in zip([0, *cuts], [*cuts, len(reply)], strict=True)]
    assert parse(made(kind), pieces) == parse(made(kind), [reply])


SCRAPS = [
    *MARKS, '{"name": "clock", ', '"arguments": {', "}", "}}", "[", "]", '"', "\\", "call:clock{", "a", " ",
    "\n", "function", "clock", "```json\n", "```", "1", ":", ",",
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.sampled_from(SCRAPS), max_size=12))
def test_nothing_vanishes(kind: str, parts: list[str]) -> None:
    """What is no call is text; of a call's arguments there is the beginning of an object, at least."""
    text, calls = parse(made(kind), parts)
    if not calls:
        assert text == "".join(parts)
    for name, arguments in calls:
        assert name == "clock"
        assert arguments == "" or arguments.startswith("{")


def test_a_call_that_is_cut_is_as_far_as_it_came() -> None:
    for end in range(len(CALLED)):
        text, calls = parse(made("hermes"), [CALLED[:end]])
        if calls:
            assert text == ""
            assert TEXT.startswith(calls[0][1])
        else:
            assert text == CALLED[:end]


def test_half_of_a_pair_before_the_name_can_be_sent() -> None:
    text = '<tool_call>\n{"arguments": {"city": "\\ud83d"}, "name": "clock"}\n</tool_call>'
    _, found = parse(made("hermes"), [text])
    assert [json.loads(arguments) for _, arguments in found] == [{"city": "\ud83d"}]
    assert all(arguments.encode() for _, arguments in found)


def test_arguments_come_as_they_are_written() -> None:
    parser = made("hermes").parser(0, TOOLS)
    events = [e for c in CALLED for e in parser.push(c)]
    assert sum(isinstance(e, CallArguments) for e in events) == len(TEXT)


def tokens(marks: Sequence[str] = MARKS) -> Tokens:
    return Tokens(byte_tokenizer(list(marks)), None, False)


def rule(
    t: Tokens, form: CallFormat, choice: str, parallel: bool = True, tools: Sequence[Any] = TOOLS
) -> GrammarConstraint:
    ends = [i for i in map(t.control, ("</s>", "<|return|>", "<|call|>")) if i is not None]
    options = Options(grammar=form.grammar(tools, choice, parallel))
    found = Grammars(t, ends).constraint(options, channel(t, form))
    assert found is not None
    return found


def channel(t: Tokens, form: CallFormat) -> Format:
    if form.name != "harmony":
        return Format()
    return channels_of(t, None).after(t, t.encode("<|start|>assistant", special=True))


def obeys(t: Tokens, constraint: GrammarConstraint, reply: str) -> bool:
    """May this be a whole reply?"""
    for token in t.encode(reply, special=True):
        if not constraint.mask(torch.zeros(t.count))[token].isfinite():
            return False
        constraint.advance(token)
    end = t.control("</s>")
    return bool(constraint.mask(torch.zeros(t.count))[end].isfinite())


def drawn(t: Tokens, form: CallFormat, constraint: GrammarConstraint, seed: int) -> str:
    """A reply's text by chance, as a server would see it."""
    stream = Stream(t, (), channel(t, form), form.show_tokens)
    source, text = torch.Generator().manual_seed(seed), ""
    ends = {t.control(n) for n in ("</s>", "<|return|>", "<|call|>")}
    likes = torch.tensor([float(i >= 256) for i in range(t.count)])
    likes[t.encode('}"]<:')] = 2.0  # so that it comes to an end
    for _ in range(900):
        token = int(constraint.mask(torch.randn(t.count, generator=source) + likes).argmax())
        constraint.advance(token)
        text += "" if token in ends else stream.push(token)
        if constraint.is_stopped:
            break
    assert constraint.is_stopped
    return text + stream.finish()


MODES = [pytest.param(True, id="tokens"), pytest.param(False, id="text")]
TOLD_BY_TOKENS = ("harmony",)  # a model of this kind has the tokens


def vocabulary(kind: str, knows: bool) -> tuple[Tokens, CallFormat]:
    if not knows and kind in TOLD_BY_TOKENS:
        pytest.skip("this format is of models that have its tokens")
    t = tokens(MARKS if knows else ["<s>", "</s>"])
    found = format_of(TEMPLATES[kind], t.is_marker)
    assert isinstance(found, CallFormat)
    return t, found


@pytest.mark.parametrize("knows", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_required_call_comes_whatever_the_model_likes(kind: str, knows: bool) -> None:
    t, form = vocabulary(kind, knows)
    for seed in range(4):
        for choice, wanted in ((REQUIRED, {"get_weather", "clock"}), ("=clock", {"clock"})):
            text, calls = parse(
                form, [drawn(t, form, rule(t, form, choice, choice != REQUIRED), seed)]
            )
            assert len(calls) == 1
            assert text == "" or kind == "harmony"  # which may say something before it calls
            assert calls[0][0] in wanted
            arguments = json.loads(calls[0][1])
            if calls[0][0] == "get_weather" and kind != "functiongemma":
                assert arguments.keys() <= {"city", "größe"}
                assert len(arguments["city"]) <= 8


@pytest.mark.parametrize("knows", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_models_write_is_allowed(kind: str, knows: bool) -> None:
    t, form = vocabulary(kind, knows)
    canonical = {
        "hermes": [CALLED, f"{CALLED}\n{CLOCKED}"],
        "generic": [CALLED, f"{CALLED}\n{CLOCKED}"],
        "llama3": [REPLIES["llama3"][0][0]],
        "mistral": [REPLIES["mistral"][0][0], REPLIES["mistral"][1][0][5:].replace("S] [", "S][")],
        "mistral 2025": [r[r.index("[T") :] for r, _, _ in REPLIES["mistral 2025"][: 1 + knows]],
        "harmony": [
            f"<|channel|>commentary to=functions.get_weather{how}<|message|>{TEXT}"
            for how in (" <|constrain|>json", "<|constrain|>json", " json", "")
        ],
        "deepseek": [REPLIES["deepseek"][0][0]],
        "deepseek 3.1": [REPLIES["deepseek 3.1"][0][0].removeprefix("Well ")],
        "functiongemma": [REPLIES["functiongemma"][0][0]],
    }[kind]
    for reply in canonical:
        assert obeys(t, rule(t, form, REQUIRED), reply), reply
        before = "<|channel|>final<|message|>Hello" if kind == "harmony" else "Hello"
        assert obeys(t, rule(t, form, AUTO), reply)
        assert obeys(t, rule(t, form, AUTO), before)
        assert not obeys(t, rule(t, form, REQUIRED), before)
        if kind not in ("llama3", "harmony"):
            assert obeys(t, rule(t, form, AUTO), "Hello " + reply)
        assert not obeys(t, rule(t, form, "=clock"), reply) or "get_weather" not in reply


@pytest.mark.parametrize("kind", ["hermes", "mistral", "mistral 2025", "deepseek", "deepseek 3.1"])
def test_several_calls_where_they_are_wanted(kind: str) -> None:
    t, form = vocabulary(kind, True)
    several = next(r for r, _, calls in REPLIES[kind] if len(calls) == 2)
    several = several[several.index(form.show_tokens[0]) :].replace(
        "[TOOL_CALLS] [", "[TOOL_CALLS]["
    )
    assert obeys(t, rule(t, form, REQUIRED, True), several)
    assert not obeys(t, rule(t, form, REQUIRED, False), several)


def test_a_model_that_thinks_may_call_after_it() -> None:
    t = tokens(["<s>", "</s>", "<tool_call>", "</tool_call>", "<think>", "</think>"])
    form = format_of(TEMPLATES["hermes"], t.is_marker)
    channels = channels_of(t, None)
    for choice in (AUTO, REQUIRED):
        options = Options(grammar=form.grammar(TOOLS, choice, True))
        found = Grammars(t, [t.encode("</s>", special=True)[0]]).constraint(options, channels)
        assert found is not None
        assert obeys(t, found, f"<think>I could {{</think>\n\n{CALLED}")
    again = "<|end|><|start|>assistant"
    said = f"<|channel|>analysis<|message|>Hm.{again}<|channel|>commentary<|message|>I look.{again}"
    t = tokens()
    harmony = format_of(TEMPLATES["harmony"], t.is_marker)
    assert isinstance(harmony, CallFormat)
    call = " to=functions.clock<|channel|>commentary json<|message|>{}"
    assert obeys(t, rule(t, harmony, REQUIRED), said + call)


LOOK = {"type": "object", "properties": {"d": {"type": "string", "pattern": "^(?!x)[0-9]+$"}}}
UNIQUE = {"type": "object", "properties": {"d": {"type": "array", "uniqueItems": True}}}


@pytest.mark.parametrize("parameters", [LOOK, UNIQUE])
def test_schemas_that_cannot_be_followed(parameters: dict[str, Any]) -> None:
    """Of a tool that is not strict it is followed as far as can be; of a strict one refused by name."""
    t, form = vocabulary("hermes", True)
    tool: dict[str, Any] = {"function": {"name": "f", "parameters": parameters}}
    text, calls = parse(form, [drawn(t, form, rule(t, form, REQUIRED, False, [tool]), 1)], [tool])
    assert (text, calls[0][0]) == ("", "f")
    strict = {"function": {**tool["function"], "strict": True}}
    with pytest.raises(OptionError, match="schema of the tool f cannot be used"):
        form.grammar([strict], AUTO, True)


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ({}, "no function with a name"),
        ({"function": {"name": 3}}, "no function with a name"),
        ({"function": {"name": "a b"}}, "a tool's name is 'a b'"),
        ({"function": {"name": "<|im_end|>"}}, "a tool's name is"),
        ({"function": {"name": "f", "parameters": [1]}}, "are no JSON schema"),
        ({"function": {"name": "f", "parameters": {"enum": ["x" * 300_000]}}}, "at most 262,144"),
        ({"function": {"name": "f", "strict": True, "parameters": {"$ref": "#/nowhere"}}}, "cannot be used"),
    ],
)  # fmt: skip
def test_what_is_no_tool(tool: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as caught:
        made("hermes").grammar([tool], AUTO, True)
    assert words in str(caught.value)
    with pytest.raises(OptionError, match="no such tool"):
        made("hermes").grammar(TOOLS, "=nowhere", True)


CHAT: Messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_told_of_its_tools(kind: str) -> None:
    messages, variables = made(kind).prompt(CHAT, TOOLS)
    if "tools" in TEMPLATES[kind]:
        assert (messages, variables) == (CHAT, {"tools": list(TOOLS)})
        return
    assert variables == {}
    assert messages[1:] == CHAT[1:]
    told = str(messages[0]["content"])
    assert told.startswith("Be short.\n\n")
    for part in ("get_weather", "Weather of a city.", "größe", made(kind).example()):
        assert part in told


def test_tools_are_told_to_models_without_a_system_message() -> None:
    form = made("generic")
    (system, user), _ = form.prompt(CHAT[1:], TOOLS)
    assert system["role"] == "system"
    assert user == CHAT[1]
    refusing = format_of(TEMPLATES["generic"] + "System role not supported", bool)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    (only,), _ = refusing.prompt(parts, TOOLS)
    assert only["role"] == "user"
    assert str(only["content"]).endswith("\n\nHi")
    assert "get_weather" in str(only["content"])


def test_what_generic_asks_for_is_what_it_reads_and_renders() -> None:
    form = made("generic")
    example = form.example().replace("FUNCTION", "clock")
    assert parse(form, [example]) == ("", [("clock", '{"PARAMETER": "VALUE"}')])
    call = {"function": {"name": "clock", "arguments": {"PARAMETER": "VALUE"}}}
    (text,) = render(
        TEMPLATES["generic"], [[CHAT[1], {"role": "assistant", "tool_calls": [call]}]], {}
    )
    assert example in text
