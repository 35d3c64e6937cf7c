"""Anthropic's messages: from bodies to what the engine is asked for, from events to frames."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from outsize.options import Options
from outsize.serve.anthropic_events import Frame, Frames, Writer, whole
from outsize.serve.anthropic_request import ask_of
from outsize.serve.anthropic_schema import CountTokens, Create
from outsize.serve.ask import Ask
from outsize.serve.errors import ApiError
from outsize.serve.events import Event
from outsize.serve.schema import read
from tests.serve.replies import CALLS, CUT_CALL, THOUGHTS, end

WEATHER = {"name": "weather", "description": "Of a city", "input_schema": {"type": "object"}}


def asked(messages: object = "hi", **more: object) -> Ask:
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    body = {"model": "m", "max_tokens": 9, "messages": said, **more}
    return ask_of(read(json.dumps(body).encode(), Create, lenient=False)[0])


def refused(messages: object = "hi", **more: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asked(messages, **more)
    assert caught.value.status == 400
    return caught.value


def called(id: str, name: str, arguments: object) -> dict[str, object]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_request() -> None:
    system = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    system[0]["cache_control"] = {"type": "ephemeral"}  # type: ignore[assignment]
    ask = asked(
        "hi", system=system,
        temperature=0.5, top_p=0.9, top_k=3, stop_sequences=["\n\n"], stream=True, metadata={"user_id": "x"},
    )  # fmt: skip
    assert ask.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    assert ask.options == Options(max_tokens=9, temperature=0.5, top_p=0.9, top_k=3, stop=("\n\n",))
    assert ask.stream


def test_what_is_not_said() -> None:
    ask = asked(system=None, tools=None, stop_sequences=None, thinking=None, top_k=None)
    assert ask.options == Options(max_tokens=9, temperature=1.0, top_p=1.0)
    assert (ask.tools, ask.tool_choice, ask.stream) == ((), "auto", False)


def test_tools_their_calls_and_results() -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "A tool knows.", "signature": "xyz"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Köln"}},
                {"type": "tool_use", "id": "t2", "name": "time", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no "}, {"type": "text", "text": "clock"}],
                },
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    ask = asked(
        messages, tools=[WEATHER], tool_choice={"type": "any", "disable_parallel_tool_use": True}
    )
    assert ask.prompt == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant", "content": "I look.", "reasoning_content": "A tool knows.",
            "tool_calls": [called("t1", "weather", {"city": "Köln"}), called("t2", "time", {})],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "t1", "name": "weather"},
        {"role": "tool", "content": "Error: no clock", "tool_call_id": "t2", "name": "time"},
        {"role": "user", "content": "Well?"},
    ]  # fmt: skip
    assert ask.tools == (
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "Of a city",
                "parameters": {"type": "object"},
            },
        },
    )
    assert (ask.tool_choice, ask.parallel_tools) == ("required", False)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("auto", "auto"), ("any", "required"), ("none", "none"), ("tool", "=weather")],
)
def test_tool_choices(choice: str, expected: str) -> None:
    named = {"name": "weather"} if choice == "tool" else {}
    assert asked(tools=[WEATHER], tool_choice={"type": choice, **named}).tool_choice == expected


def test_turns_of_one_side_are_one() -> None:
    roles = ["user", "user", "system", "assistant", "assistant", "user"]
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    assert asked(messages).prompt == [
        {"role": "user", "content": "0\n\n1"},
        {"role": "system", "content": "2"},
        {"role": "assistant", "content": "3\n\n4"},
        {"role": "user", "content": "5"},
    ]


def test_a_last_message_of_the_assistant_is_gone_on_with() -> None:
    began = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is ("}]
    assert asked(began).options.continue_final
    assert not asked(began[:1]).options.continue_final
    call = {"type": "tool_use", "id": "t", "name": "weather", "input": {}}
    assert not asked([began[0], {"role": "assistant", "content": [call]}]).options.continue_final


ON = {"enable_thinking": True, "thinking": True}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, ON),
        ({"thinking": {"type": "adaptive"}}, ON),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False, "thinking": False}),
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "high"}),
    ],
)  # fmt: skip
def test_thinking_is_the_templates(fields: dict[str, object], expected: dict[str, object]) -> None:
    assert asked(**fields).options.template_args == expected


def test_a_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    config = {"format": {"type": "json_schema", "schema": schema}}
    assert asked(output_config=config).options.schema == schema


def test_count_tokens_needs_no_max_tokens() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER]}
    read_body = read(json.dumps(body).encode(), CountTokens, lenient=False)[0]
    assert ask_of(read_body).prompt == body["messages"]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
RESULT = {"type": "tool_result", "tool_use_id": "t"}
SERVER_TOOL = {"type": "web_search_20250305", "name": "web_search"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"max_tokens": -1}, "max_tokens", "1"),
        ({"messages": []}, "messages", "1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "user"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0", "'image'.*reads text"),
        ({"messages": [{"role": "user", "content": [{**RESULT, "content": [IMAGE]}]}]},
         "messages.0.content.0.content.0", "'image'.*reads text"),
        ({"messages": [{"role": "assistant", "content": [RESULT]}]}, "messages.0.content.0", "tool_result"),
        ({"system": [IMAGE]}, "system.0", "'image'"),
        ({"stop_sequences": [""]}, "stop_sequences", "empty"),
        ({"tools": [SERVER_TOOL]}, "tools.0.type", "Anthropic's servers"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "two"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools.0.defer_loading", "leave it out"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "w"}}, "tool_choice", "'w'.*weather"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name", "needs a name"),
        ({"container": "c"}, "container", "leave it out"),
        ({"speed": "fast"}, "speed", "standard"),
        ({"inference_geo": "us"}, "inference_geo", "where it runs"),
        ({"mcp_servers": [{}]}, "mcp_servers", "leave it out"),
        ({"max_token": 5}, "max_token", "did you mean 'max_tokens'"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name", "not known"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], param: str, words: str) -> None:
    error = refused(**{"messages": "hi", **fields})
    assert error.param == param
    assert re.search(words, error.message), error.message


def frames_of(events: list[Event], last: Event | None = None, **more: bool) -> list[Frame]:
    frames = Frames("msg_1", "m", 11, **more)
    made = [frame for event in [*events, last or end()] for frame in frames.of(event)]
    return [frames.start(), *made, frames.end()]


def test_frames_of_a_text_and_calls() -> None:
    frames = frames_of(CALLS, end("tool_calls"))
    assert frames[0]["type"] == "message_start"
    message = frames[0]["message"]
    assert isinstance(message, dict)
    assert (message["content"], message["usage"]["input_tokens"]) == ([], 11)
    deltas = [
        {"type": "text_delta", "text": "Look. "},
        {"type": "input_json_delta", "partial_json": '{"city": '},
        {"type": "input_json_delta", "partial_json": '"Köln"}'},
        {"type": "input_json_delta", "partial_json": "{}"},
    ]
    blocks = [
        {"type": "text", "text": ""},
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {}},
        {"type": "tool_use", "id": "call_2", "name": "time", "input": {}},
    ]
    starts = [
        {"type": "content_block_start", "index": i, "content_block": block}
        for i, block in enumerate(blocks)
    ]
    grown = [
        {"type": "content_block_delta", "index": i, "delta": d}
        for i, d in zip((0, 1, 1, 2), deltas, strict=True)
    ]
    stops = [{"type": "content_block_stop", "index": i} for i in range(3)]
    assert frames[1:-2] == [
        starts[0], grown[0], stops[0], starts[1], grown[1], grown[2], stops[1], starts[2], grown[3], stops[2],
    ]  # fmt: skip
    assert frames[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert frames[-1] == {"type": "message_stop"}


def test_frames_of_thinking() -> None:
    frames = frames_of(THOUGHTS)
    told = [(f["index"], f["delta"]) for f in frames if f["type"] == "content_block_delta"]
    assert told == [
        (0, {"type": "thinking_delta", "thinking": "Let me "}),
        (0, {"type": "thinking_delta", "thinking": "see."}),
        (0, {"type": "signature_delta", "signature": ""}),
        (1, {"type": "text_delta", "text": "4"}),
        (1, {"type": "text_delta", "text": "2"}),
    ]


def test_thinking_that_is_not_wanted_is_not_told() -> None:
    blocks = whole(frames_of(THOUGHTS, shows_thinking=False))["content"]
    assert blocks == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": "42"},
    ]


def test_a_whole_message() -> None:
    message = whole(frames_of(CALLS, end("tool_calls")))
    assert message["content"] == [
        {"type": "text", "text": "Look. "},
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Köln"}},
        {"type": "tool_use", "id": "call_2", "name": "time", "input": {}},
    ]
    usage = message["usage"]
    assert isinstance(usage, dict)
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (
        11,
        0,
        7,
    )
    assert (message["id"], message["type"], message["role"]) == ("msg_1", "message", "assistant")


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (end("stop"), ("end_turn", None)),
        (end("stop", "\n\n"), ("stop_sequence", "\n\n")),
        (end("length"), ("max_tokens", None)),
        (end("tool_calls"), ("tool_use", None)),
    ],
)
def test_why_it_ended(last: Event, expected: tuple[str, str | None]) -> None:
    message = whole(frames_of([], last))
    assert (message["stop_reason"], message["stop_sequence"]) == expected
    assert message["content"] == []


def test_a_call_that_was_cut_is_text() -> None:
    assert whole(frames_of(CUT_CALL, end("length")))["content"] == [
        {"type": "text", "text": '{"name": "weather", "arguments": {"ci'}
    ]


def test_what_is_sent() -> None:
    writer = Writer(Frames("msg_1", "m", 11), "req_1")
    assert writer.start().startswith(b'event: message_start\ndata: {"type":"message_start",')
    assert writer.silence() == b'event: ping\ndata: {"type":"ping"}\n\n'
    assert writer.end() == b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    failed = writer.failed(ApiError(status=500, message="no"))
    said = b'{"type":"error","error":{"type":"api_error","message":"no"},"request_id":"req_1"}'
    assert failed == b"event: error\ndata: " + said + b"\n\n"


@pytest.mark.parametrize(
    ("block", "param"),
    [
        ({"type": "text", "text": 5}, "messages.0.content.0.text"),
        ({"type": "text"}, "messages.0.content.0.text"),
        ({"type": "tool_use", "id": "t", "name": "n", "input": [1]}, "messages.0.content.0.input"),
        ({}, "messages.0.content.0.type"),
        (7, "messages.0.content.0"),
    ],
)
def test_a_malformed_block_is_named_by_its_place(block: object, param: str) -> None:
    assert refused([{"role": "user", "content": [block]}]).param == param
