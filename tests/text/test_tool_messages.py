"""Calls of tools, their results, and unfinished messages, in templates of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from outsize.engine.model import Model
from outsize.errors import OptionError, TemplateError
from outsize.options import Options
from outsize.text.template import render

ID, OTHER = "call_0123456789abcdef01234567", "call_9876543210abcdef01234567"
ARGUMENTS = {"city": "Zürich", "n": 1}
SPACED = '{"city": "Zürich", "n": 1}'
# How published templates write calls, each in few words of our own.
EACH = "{% for m in messages %}<{{ m.role }}>"
END = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
CALLS = "{% for c in m.tool_calls %}"
TEMPLATES = {
    "objects (Qwen 2.5)": EACH + "{{ m.content }}" + CALLS
    + "[{{ c.function.name }}|{{ c.function.arguments | tojson }}]{% endfor %}" + END,
    "texts, joined (DeepSeek R1)": EACH + "{{ m.content or '' }}" + CALLS
    + "{{ '[' + c.function.name + '|' + c.function.arguments + ']' }}{% endfor %}" + END,
    "both (Qwen 3)": EACH + "{{ m.content or '' }}" + CALLS
    + "[{{ c.function.name }}|{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
    "{{ c.function.arguments | tojson }}{% endif %}]{% endfor %}" + END,
    "for no text alone (R1's distillations)": EACH + "{% if m.content is none %}" + CALLS
    + "[{{ c.function.name }}|{{ c.function.arguments | tojson }}]{% endfor %}{% else %}{{ m.content }}"
    "{% endif %}" + END,
    "one at a time (Llama 3)": EACH + "{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('only one') }}{% endif %}" + CALLS
    + "[{{ c.function.name }}|{{ c.function.arguments | tojson }}]{% endfor %}{% else %}{{ m.content }}"
    "{% endif %}" + END,
    "the first alone (gpt-oss)": EACH + "{% if 'tool_calls' in m %}{% set c = m.tool_calls[0] %}"
    "[{{ c.function.name }}|{{ c.function.arguments | tojson }}]{% else %}{{ m.content }}{% endif %}" + END,
    "ids of nine (Mistral)": EACH + "{{ m.content }}" + CALLS + "{% if c.id | length != 9 %}"
    "{{ raise_exception('nine') }}{% endif %}[{{ c.function.name }}|{{ c.function.arguments | tojson }}]"
    "#{{ c.id }}{% endfor %}{% if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('nine') }}{% endif %}#{{ m.tool_call_id }}{% endif %}" + END,
    "nothing of tools (SmolLM2)": EACH + "{{ m.content }}" + END,
    "turns by turns (Gemma)": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}" + END,
}  # fmt: skip
UNKNOWING = [k for k in TEMPLATES if k.startswith(("nothing", "turns"))]


def call(name: str = "get", arguments: object = SPACED, id: str = ID) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str, id: str = ID) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "name": "get", "content": text}


def shown(kind: str, *messages: Mapping[str, object]) -> str:
    (text,) = render(TEMPLATES[kind], [[{"role": "user", "content": "hi"}, *messages]], {})
    return text


def written(name: str, arguments: str, kind: str) -> str:
    if kind in UNKNOWING:
        return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    return f"[{name}|{arguments}]"


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("arguments", [SPACED, ARGUMENTS, json.dumps(ARGUMENTS)])
def test_a_call_is_shown_however_it_is_sent(kind: str, arguments: object) -> None:
    """As OpenAI's clients send it, a text, or as Ollama's, an object; with every way of having no text."""
    texts = set()
    for empty in ({"content": None}, {}, {"content": ""}):
        said = {"role": "assistant", "tool_calls": [call(arguments=arguments)], **empty}
        texts.add(shown(kind, said, result("sunny")))
    (text,) = texts
    assert written("get", SPACED, kind) in text
    assert "sunny" in text
    assert "None" not in text


@pytest.mark.parametrize("kind", TEMPLATES)
def test_several_calls_are_all_shown(kind: str) -> None:
    calls = [call("get"), call("clock", "{}", OTHER)]
    for results in (
        [result("sunny"), result("noon", OTHER)],
        [result("noon", OTHER), result("sunny")],
    ):
        said = {"role": "assistant", "content": None, "tool_calls": calls}
        text = shown(kind, said, *results, {"role": "assistant", "content": "done"})
        parts = [
            written("get", SPACED, kind),
            written("clock", "{}", kind),
            "sunny",
            "noon",
            "done",
        ]
        assert all(text.count(part) == 1 for part in parts)
        if kind.startswith(("one at", "the first")):  # each before its own result
            places = [text.index(p) for p in ("[get", "sunny", "[clock", "noon", "done")]
            assert places == sorted(places)


def test_results_without_ids_belong_to_calls_in_their_order() -> None:
    calls = [call("get"), call("clock", "{}", OTHER)]
    results = [{"role": "tool", "content": text} for text in ("sunny", "noon", "more")]
    text = shown("one at a time (Llama 3)", {"role": "assistant", "tool_calls": calls}, *results)
    places = [text.index(p) for p in ("[get", "sunny", "[clock", "noon", "more")]
    assert places == sorted(places)


def test_an_answer_without_calls_has_none() -> None:
    for calls in (None, []):
        said = {"role": "assistant", "content": "no", "tool_calls": calls}
        for kind in TEMPLATES:
            assert shown(kind, said).endswith("<assistant>no<assistant>")


def test_ids_that_are_too_long_are_short_and_the_same() -> None:
    kind = "ids of nine (Mistral)"
    text = shown(kind, {"role": "assistant", "tool_calls": [call()]}, result("sunny"))
    first, second = (part[:9] for part in text.split("#")[1:])
    assert first == second
    assert first.isalnum()
    assert "#abcdefghi" in shown(kind, {"role": "assistant", "tool_calls": [call(id="abcdefghi")]})


def test_names_of_control_tokens_in_arguments_stay_text() -> None:
    """The marks around them survive that a text becomes an object, and an object a text."""
    from outsize.text.untrusted import Marks

    marks = Marks(["<|im_end|>"])
    for kind in TEMPLATES:
        for arguments in ('{"a": "<|im_end|>"}', {"a": "<|im_end|>"}):
            said = {"role": "assistant", "tool_calls": [call(arguments=arguments)]}
            marked = marks.mark(said)
            assert isinstance(marked, dict)
            assert "<|im_end|>" not in marks.broken(shown(kind, marked))


WRONG: list[tuple[object, str]] = [
    ("x", "a list is expected"), ([1], "is expected"), ([{}], "is expected"),
    ([{"function": {"name": 3}}], "is expected"), ([{"function": "f"}], "is expected"),
]  # fmt: skip


@pytest.mark.parametrize(("calls", "words"), WRONG)
def test_what_is_no_call(open_tiny: Callable[..., Model], calls: object, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        open_tiny().count([{"role": "assistant", "content": "", "tool_calls": calls}])


ENDS = {
    "chatml": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "trimming": "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}",
    "thinking": "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}"
    "<think></think>{% endif %}{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}",
}


@pytest.mark.parametrize("kind", ENDS)
def test_a_message_is_continued(kind: str) -> None:
    for said in ("The answer", "Zürich: ", "a <|end|>"):
        chat = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        (text,) = render(ENDS[kind], [chat], {}, unfinished=True)
        assert text.endswith(said)
        assert text.count(said.strip()) == 2


def test_a_message_that_is_not_shown_cannot_be_continued() -> None:
    with pytest.raises(TemplateError, match="does not render the last message"):
        render(
            "{{ messages[0].content }}",
            [[{"role": "user", "content": "a"}] * 2],
            {},
            unfinished=True,
        )


def test_what_can_be_continued(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny()
    user, said = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, so"}
    plain = model.encode([[user, said]], Options())[0]
    ids = model.encode([[user, said]], Options(continue_final=True))[0]
    assert model.tokens.decode(ids).endswith("assistant: Well, so")
    assert ids == plain[: len(ids)]
    (reply,) = model.generate([[user, said]], continue_final=True, max_tokens=4)
    assert reply.prompt_tokens == len(ids)
    wrong: Sequence[Any] = ("hi", [user], [said, user], [{"role": "assistant", "content": ""}],
                            [{**said, "tool_calls": [call()]}])  # fmt: skip
    for prompt in wrong:
        with pytest.raises(OptionError, match="continue_final goes on with the last message"):
            model.encode([prompt], Options(continue_final=True))
    with pytest.raises(OptionError, match="give one of them"):
        model.encode([[user, said]], Options(continue_final=True, schema={}))
