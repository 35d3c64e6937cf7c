"""Tools in the dialects: a call is made, told, and its result taken back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

import outsize
from outsize.serve.messages import object_of
from outsize.serve.options import ServeOptions
from tests.golden.tiny import write_folder
from tests.serve.conftest import Running, serving

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Köln", "Ulm"]}},
    "required": ["city"],
    "additionalProperties": False,
}
SAID = [{"role": "user", "content": "Weather?"}]
CHOICES = ["required", "named"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Running]:
    """A server of a tiny model with a context that a description of tools fits in, a token a byte."""
    folder = write_folder(tmp_path_factory.mktemp("long") / "llama", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    options = ServeOptions(port=0, grace=0.0, alias=("other",))
    with serving(partial(outsize.load, str(folder), quiet=True), options) as running:
        yield running.until_ready()


def city(arguments: object) -> str:
    assert isinstance(arguments, dict)
    assert list(arguments) == ["city"]
    return str(arguments["city"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_claude(served: Running, choice: str, stream: bool) -> None:
    tools = [{"name": "weather", "description": "Of a city", "input_schema": SCHEMA}]
    chosen = {"type": "any"} if choice == "required" else {"type": "tool", "name": "weather"}
    ask: Any = {
        "model": "other",
        "max_tokens": 200,
        "tools": tools,
        "extra_body": {"temperature": 0},
    }
    with anthropic.Anthropic(
        base_url=served.url, api_key="x", _strict_response_validation=True
    ) as client:
        more: Any = {"messages": SAID, "tool_choice": {**chosen, "disable_parallel_tool_use": True}}
        if stream:
            with client.messages.stream(**ask, **more) as events:
                message: Any = events.get_final_message()
        else:
            message = client.messages.create(**ask, **more)
        assert message.stop_reason == "tool_use"
        (call,) = message.content
        assert call.name == "weather"
        assert city(call.input) in ("Köln", "Ulm")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        back = [
            *SAID,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]},
        ]
        ask["max_tokens"] = 5
        assert client.messages.create(**ask, messages=back).stop_reason in (
            "end_turn",
            "max_tokens",
        )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_responses(served: Running, choice: str, stream: bool) -> None:
    tools = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}]
    chosen = "required" if choice == "required" else {"type": "function", "name": "weather"}
    ask: Any = {"model": "other", "max_output_tokens": 200, "temperature": 0, "tools": tools}
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="x", _strict_response_validation=True
    ) as client:
        more: Any = {"input": SAID, "tool_choice": chosen, "parallel_tool_calls": False}
        if stream:
            with client.responses.stream(**ask, **more) as events:
                response: Any = events.get_final_response()
        else:
            response = client.responses.create(**ask, **more)
        assert response.status == "completed"
        (call,) = response.output
        assert (call.type, call.name) == ("function_call", "weather")
        assert city(json.loads(call.arguments)) in ("Köln", "Ulm")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        ask["max_output_tokens"] = 5
        again = client.responses.create(**ask, input=[*SAID, call, result])
        assert again.status in ("completed", "incomplete")


ARGUMENTS = {"city": "Köln"}
TEXT = json.dumps(ARGUMENTS)
FUNCTION = {"name": "weather", "parameters": SCHEMA}
CALLED = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": TEXT}}
USED = {"type": "tool_use", "id": "c1", "name": "weather", "input": ARGUMENTS}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}
MADE = {"id": "c1", "function": {"name": "weather", "arguments": ARGUMENTS}}
ITEM = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": TEXT}
TURNS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "max_tokens": 5,
        "tools": [{"type": "function", "function": FUNCTION}],
        "messages": [
            *SAID,
            {"role": "assistant", "content": None, "tool_calls": [CALLED]},
            {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "sunny"},
        ],
    },
    "/v1/messages": {
        "max_tokens": 5,
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
        "messages": [
            *SAID,
            {"role": "assistant", "content": [USED]},
            {"role": "user", "content": [RESULT]},
        ],
    },
    "/v1/responses": {
        "max_output_tokens": 5,
        "tools": [{"type": "function", **FUNCTION}],
        "input": [
            *SAID,
            ITEM,
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        ],
    },
    "/api/chat": {
        "stream": False,
        "options": {"num_predict": 5},
        "tools": [{"type": "function", "function": FUNCTION}],
        "messages": [
            *SAID,
            {"role": "assistant", "content": "", "tool_calls": [MADE]},
            {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        ],
    },
}


def test_the_same_turns_are_the_same_prompt(served: Running) -> None:
    """Calls and their results, in whatever dialect they are told."""
    sizes = {}
    with served.client() as client:
        for path, body in TURNS.items():
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            told = answer.json()
            used = told.get("usage", told)
            cached = used.get("cache_read_input_tokens", 0)
            names = ("prompt_tokens", "input_tokens", "prompt_eval_count")
            sizes[path] = cached + next(used[name] for name in names if name in used)
    assert len(set(sizes.values())) == 1, sizes


@pytest.mark.parametrize("value", ["\\ud83d", "a\\ude00b", "\\ud83d\\ude00", "Köln"])
def test_half_of_a_pair_in_arguments_can_be_sent(value: str) -> None:
    """A model that was cut, or errs, writes one: every dialect sends UTF-8."""
    made = object_of(f'{{"a": "{value}"}}')
    wanted = json.loads(f'"{value}"').encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert json.dumps(made, ensure_ascii=False).encode().decode() == f'{{"a": "{wanted}"}}'


FUNCTION = {"name": "weather", "parameters": SCHEMA}
TOOLS_AND_SCHEMA: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": SAID,
        "tools": [{"type": "function", "function": FUNCTION}],
        "response_format": {"type": "json_object"},
    },
    "/v1/responses": {
        "input": "Weather?",
        "tools": [{"type": "function", **FUNCTION}],
        "text": {"format": {"type": "json_object"}},
    },
    "/v1/messages": {
        "messages": SAID,
        "max_tokens": 5,
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    },
    "/api/chat": {
        "messages": SAID,
        "tools": [{"type": "function", "function": FUNCTION}],
        "format": "json",
    },
}


@pytest.mark.parametrize("path", TOOLS_AND_SCHEMA)
def test_tools_with_a_schema_are_refused_by_a_field_that_was_sent(
    served: Running, path: str
) -> None:
    """Programs leave out the field that an error names, and ask again."""
    body = {"model": "other", **TOOLS_AND_SCHEMA[path]}
    with served.client() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error if isinstance(error, str) else error["message"]).startswith("tools: ")
