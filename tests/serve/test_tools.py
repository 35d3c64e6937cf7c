"""Calls of tools and schemas over HTTP, as OpenAI's own client asks for them and reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import outsize
from tests.golden.tiny import write_folder
from tests.serve.conftest import OPTIONS, Running, serving

ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "ä": {"enum": ["日本😀"]}},
            "required": ["a", "ä"],
        },
    },
}  # fmt: skip
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": "add"}}
ASKED: list[Any] = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"ä": {"const": "日本😀 é"}},
    "required": ["ä"],
    "additionalProperties": False,
}


# In few letters, each of which is a token here: what is known of calls, and how they are shown.
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} <tool_call></tool_call>{% endfor %}"
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Running]:
    folder = write_folder(tmp_path_factory.mktemp("calling") / "m", "llama")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    opens = partial(outsize.load, str(folder), grammars=True, quiet=True)
    with serving(opens, replace(OPTIONS, grace=0.0, alias=("other",))) as running:
        yield running.until_ready()


@pytest.fixture
def api(calling: Running) -> Iterator[openai.OpenAI]:
    with httpx.Client(trust_env=False) as http:
        yield openai.OpenAI(
            base_url=f"{calling.url}/v1", api_key="none", max_retries=0, http_client=http,
            _strict_response_validation=True,
        )  # fmt: skip


def asked(api: openai.OpenAI, **more: Any) -> Any:
    more = {"model": "other", "messages": ASKED, "max_tokens": 200, **more}
    return api.chat.completions.create(**more)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_must_come(api: openai.OpenAI, choice: Any, stream: bool) -> None:
    more = {"tools": [ADD, CLOCK], "tool_choice": choice, "parallel_tool_calls": False, "seed": 3}
    if stream:
        with api.chat.completions.stream(
            model="other",
            messages=ASKED,
            max_tokens=200,
            **more,  # type: ignore[arg-type]
        ) as events:
            for event in events:
                if event.type == "chunk":
                    calls = event.chunk.choices[0].delta.tool_calls or []
                    assert len({c.index for c in calls}) == len(calls)
            reply = events.get_final_completion()
    else:
        reply = asked(api, **more)
    (first,) = reply.choices
    assert first.finish_reason == "tool_calls"
    assert not first.message.content
    (call,) = first.message.tool_calls
    assert call.function.name in (["add"] if choice is NAMED else ["add", "clock"])
    if call.function.name == "add":
        arguments = json.loads(call.function.arguments)
        assert arguments.keys() == {"a", "ä"}
        assert 0 <= arguments["a"] <= 99
        assert arguments["ä"] == "日本😀"
    history = [*ASKED, first.message.model_dump(exclude_none=True)]
    history += [{"role": "tool", "tool_call_id": call.id, "content": "42"}]
    assert asked(api, messages=history, tools=[ADD], max_tokens=4).choices


def test_a_call_that_must_come_is_one_unless_more_are_asked_for(api: openai.OpenAI) -> None:
    more = {"tools": [CLOCK], "tool_choice": "required", "temperature": 2, "max_tokens": 400}
    counts = {}
    for parallel in (None, True):
        said = {**more, "parallel_tool_calls": parallel}
        calls = [asked(api, seed=i, **said).choices[0].message.tool_calls for i in range(6)]
        counts[parallel] = [len(c) for c in calls]
    assert set(counts[None]) == {1}
    assert max(counts[True]) > 1


def test_text_where_the_model_may_choose(api: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        reply = asked(api, tools=[ADD], tool_choice=choice, max_tokens=8).choices[0]
        assert reply.finish_reason in ("length", "stop")
        assert not reply.message.tool_calls


def test_every_shape_of_a_history(api: openai.OpenAI) -> None:
    call = {
        "id": "call_0",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 1}'},
    }
    result = {"role": "tool", "tool_call_id": "call_0", "content": "2"}
    for said in (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "content": "So", "tool_calls": [call]},
        {"role": "assistant", "content": [{"type": "text", "text": "So"}], "tool_calls": [call]},
    ):
        for last in (result, {**result, "content": [{"type": "text", "text": "2"}]}):
            assert asked(api, messages=[*ASKED, said, last], max_tokens=2).choices
    assert asked(api, messages=[*ASKED, {"role": "assistant", "content": "a", "tool_calls": None}, *ASKED],
                 tools=None, max_tokens=2).choices  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_obeyed(api: openai.OpenAI, stream: bool) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": SCHEMA | {"additionalProperties": False}},
    }
    made = asked(api, response_format=form, stream=stream)
    if stream:
        pieces = [c.choices[0].delta.content or "" for c in made]
        assert not any("\ufffd" in piece for piece in pieces)
        text, reason = "".join(pieces), "stop"
    else:
        text, reason = made.choices[0].message.content, made.choices[0].finish_reason
    assert (json.loads(text), reason) == ({"ä": "日本😀 é"}, "stop")


def as_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": as_format({"type": 1})}, "type"),
    ({"response_format": as_format({"$ref": "#"})}, "text"),
    ({"tools": [tool("a b")]}, "name"),
    ({"tools": [tool("a", strict=True, parameters={"type": "hiccup"})]}, "hiccup"),
    ({"tools": [ADD], "response_format": {"type": "json_object"}}, "schema"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_what_cannot_be_obeyed(api: openai.OpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        asked(api, **fields)
    assert words in str(caught.value)


def test_an_answer_is_continued(calling: Running) -> None:
    messages = [*ASKED, {"role": "assistant", "content": "Well, "}]
    more = {"max_tokens": 3, "continue_final_message": True, "add_generation_prompt": False}
    with calling.client() as client:
        for asking, status in ((messages, 200), (ASKED, 400)):
            body = {"model": "other", "messages": asking, **more}
            assert client.post("/v1/chat/completions", json=body).status_code == status
