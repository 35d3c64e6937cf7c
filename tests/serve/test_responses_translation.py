"""OpenAI's responses: from bodies to what the engine is asked for, from events to frames."""

from __future__ import annotations

import json
import re
from itertools import count
from typing import Any

import pytest

from outsize.options import Options
from outsize.sampling.logprobs import TokenLogprob
from outsize.serve.ask import Ask
from outsize.serve.errors import ApiError
from outsize.serve.events import Event, Part
from outsize.serve.responses_events import Frame, Frames, Kit, Writer, whole
from outsize.serve.responses_request import ask_of
from outsize.serve.responses_schema import Create
from outsize.serve.schema import read
from tests.serve.replies import CALLS, CUT_CALL, THOUGHTS, end

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def asked(input: object = "hi", **more: object) -> Ask:
    body = {"model": "m", "input": input, **more}
    return ask_of(read(json.dumps(body).encode(), Create, lenient=False)[0])


def test_a_request() -> None:
    ask = asked(
        instructions="Be brief.", max_output_tokens=9, temperature=0.5, top_p=0.9, stream=True,
        presence_penalty=0.5, frequency_penalty=0.25, store=True, metadata={"a": "b"}, user="me",
        truncation="disabled", background=False, service_tier="auto", parallel_tool_calls=False,
    )  # fmt: skip
    assert ask.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    assert ask.options == Options(
        max_tokens=9, temperature=0.5, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.25
    )
    assert (ask.stream, ask.parallel_tools) == (True, False)


def test_what_is_not_said() -> None:
    ask = asked(instructions=None, tools=None, text=None, reasoning=None, include=None)
    assert ask.options == Options(max_tokens=1 << 24, temperature=1.0, top_p=1.0)
    assert (ask.tools, ask.tool_choice, ask.stream) == ((), "auto", False)
    nothing = ask_of(read(b"{}", Create, lenient=False)[0])
    assert nothing.prompt == [{"role": "user", "content": ""}], "the client's type allows it"
    assert asked(None).prompt == nothing.prompt


def text(said: str, kind: str = "input_text") -> dict[str, object]:
    return {"type": kind, "text": said}


def called(id: str, name: str, arguments: str) -> dict[str, object]:
    return {"type": "function_call", "call_id": id, "name": name, "arguments": arguments}


def test_items() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [text("Wea"), text("ther?")]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [text("A tool.", "reasoning_text")]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "phase": "commentary",
         "content": [{**text("I look.", "output_text"), "annotations": []}]},
        {"id": "fc_1", **called("c1", "weather", '{"city": "Köln"}')},
        called("c2", "time", ""),
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [text("12:00")]},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]  # fmt: skip
    first = {"id": "c1", "type": "function"}
    first["function"] = {"name": "weather", "arguments": {"city": "Köln"}}  # type: ignore[assignment]
    second = {"id": "c2", "type": "function", "function": {"name": "time", "arguments": {}}}
    ask = asked(items)
    assert ask.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "A tool.",
            "tool_calls": [first, second],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "weather"},
        {"role": "tool", "content": "12:00", "tool_call_id": "c2", "name": "time"},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "No."},
    ]
    assert not ask.options.continue_final, "a new message is asked for"


def test_a_tool() -> None:
    function = {"name": "weather", "parameters": {"type": "object"}}
    assert asked(tools=[WEATHER]).tools == ({"type": "function", "function": function},)


TIME = {**WEATHER, "name": "time"}


def allowed(mode: str, name: str) -> dict[str, object]:
    tools = [{"type": "function", "name": name}]
    return {"type": "allowed_tools", "mode": mode, "tools": tools}


@pytest.mark.parametrize(
    ("choice", "expected", "names"),
    [
        ("auto", "auto", ["weather", "time"]),
        ("none", "none", ["weather", "time"]),
        ("required", "required", ["weather", "time"]),
        ({"type": "function", "name": "time"}, "=time", ["weather", "time"]),
        (allowed("auto", "time"), "auto", ["time"]),
        (allowed("required", "weather"), "required", ["weather"]),
    ],
)  # fmt: skip
def test_tool_choices(choice: object, expected: str, names: list[str]) -> None:
    ask = asked(tools=[WEATHER, TIME], tool_choice=choice)
    found = [tool["function"]["name"] for tool in ask.tools]  # type: ignore[index]
    assert (ask.tool_choice, found) == (expected, names)


@pytest.mark.parametrize(
    ("format", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}, SCHEMA),
    ],
)
def test_formats(format: object, schema: object) -> None:
    assert asked(text={"format": format, "verbosity": "medium"}).options.schema == schema


@pytest.mark.parametrize(
    ("effort", "arguments"),
    [
        (None, None),
        ("none", {"enable_thinking": False, "thinking": False}),
        ("high", {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}),
    ],
)
def test_thinking_is_the_templates(effort: object, arguments: object) -> None:
    assert asked(reasoning={"effort": effort, "summary": "auto"}).options.template_args == arguments


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"top_logprobs": 3}, 3),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, 2),
        ({"include": ["reasoning.encrypted_content"]}, None),
    ],
)
def test_logprobs(fields: dict[str, object], logprobs: int | None) -> None:
    assert asked(**fields).options.logprobs == logprobs


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
CALL = called("c", "x", "{")
NO_TOOL = {"type": "function", "name": "w"}
PADDED = {"include_obfuscation": True}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "1 item"),
        ({"max_output_tokens": 0}, "max_output_tokens", "1"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input.0.content.0", "'input_image'.*reads text"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "user"),
        ({"input": [CALL]}, "input.0.arguments", "JSON object"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0", "send it whole"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0", "'web_search_call'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "OpenAI's servers"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "two"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [WEATHER], "tool_choice": NO_TOOL}, "tool_choice", "'w'.*weather"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "no responses: send the whole"),
        ({"conversation": "conv_1"}, "conversation", "keeps no responses"),
        ({"background": True}, "background", "keeps no responses"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "keeps no prompts"),
        ({"truncation": "auto"}, "truncation", "never cuts"),
        ({"include": ["file_search_call.results"]}, "include", "not here"),
        ({"max_tool_calls": 3}, "max_tool_calls", "client runs"),
        ({"service_tier": "flex"}, "service_tier", "default"),
        ({"stream": True, "stream_options": PADDED}, "stream_options.include_obfuscation", "padded"),
        ({"max_tokens": 5}, "max_tokens", "not known"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        asked(**{"input": "hi", **fields})
    assert re.search(words, caught.value.message), caught.value.message
    assert (caught.value.status, caught.value.param) == (400, param)


def made_frames() -> Frames:
    numbers = count(1)
    kit = Kit(
        new_id=lambda prefix: f"{prefix}{next(numbers)}",
        clock=lambda: 9.5,
        usage=lambda last: {"output_tokens": last.reply.new_tokens},
        logprobs=lambda part: [{"token": str(t.token)} for t in part.tokens],
    )
    return Frames({"id": "resp_1", "object": "response"}, kit)


def frames_of(events: list[Event], last: Event | None = None) -> list[Frame]:
    frames = made_frames()
    return [*frames.start(), *(f for event in [*events, last or end()] for f in frames.of(event))]


def short(frame: Frame) -> tuple[object, ...]:
    """A frame's type, and what it tells."""
    named = ("output_index", "item_id", "delta", "text", "arguments")
    return (str(frame["type"]).removeprefix("response."), *(frame[n] for n in named if n in frame))


def test_frames_of_a_text() -> None:
    assert [short(frame) for frame in frames_of([Part(0, "4"), Part(0, "2")])] == [
        ("created",),
        ("in_progress",),
        ("output_item.added", 0),
        ("content_part.added", 0, "msg_1"),
        ("output_text.delta", 0, "msg_1", "4"),
        ("output_text.delta", 0, "msg_1", "2"),
        ("output_text.done", 0, "msg_1", "42"),
        ("content_part.done", 0, "msg_1"),
        ("output_item.done", 0),
        ("completed",),
    ]


def test_frames_of_thoughts_and_calls() -> None:
    frames = frames_of([*THOUGHTS, *CALLS], end("tool_calls"))
    assert [short(frame) for frame in frames[2:-1]] == [
        ("output_item.added", 0),
        ("content_part.added", 0, "rs_1"),
        ("reasoning_text.delta", 0, "rs_1", "Let me "),
        ("reasoning_text.delta", 0, "rs_1", "see."),
        ("reasoning_text.done", 0, "rs_1", "Let me see."),
        ("content_part.done", 0, "rs_1"),
        ("output_item.done", 0),
        ("output_item.added", 1),
        ("content_part.added", 1, "msg_2"),
        ("output_text.delta", 1, "msg_2", "4"),
        ("output_text.delta", 1, "msg_2", "2"),
        ("output_text.delta", 1, "msg_2", "Look. "),
        ("output_text.done", 1, "msg_2", "42Look. "),
        ("content_part.done", 1, "msg_2"),
        ("output_item.done", 1),
        ("output_item.added", 2),
        ("function_call_arguments.delta", 2, "fc_3", '{"city": '),
        ("function_call_arguments.delta", 2, "fc_3", '"Köln"}'),
        ("function_call_arguments.done", 2, "fc_3", '{"city": "Köln"}'),
        ("output_item.done", 2),
        ("output_item.added", 3),
        ("function_call_arguments.delta", 3, "fc_4", "{}"),
        ("function_call_arguments.done", 3, "fc_4", "{}"),
        ("output_item.done", 3),
    ]
    assert [frame["sequence_number"] for frame in frames] == list(range(len(frames)))


def test_a_whole_response() -> None:
    response = whole(iter(frames_of([*THOUGHTS, *CALLS], end("tool_calls"))))
    said = {"type": "output_text", "text": "42Look. ", "annotations": [], "logprobs": []}
    done = {"status": "completed"}
    assert response == {
        "id": "resp_1", "object": "response", "status": "completed", "completed_at": 9, "error": None,
        "incomplete_details": None, "usage": {"output_tokens": 7},
        "output": [
            {"id": "rs_1", "type": "reasoning", **done, "summary": [],
             "content": [{"type": "reasoning_text", "text": "Let me see."}]},
            {"id": "msg_2", "type": "message", **done, "role": "assistant", "content": [said]},
            {"id": "fc_3", **done, **called("call_1", "weather", '{"city": "Köln"}')},
            {"id": "fc_4", **done, **called("call_2", "time", "{}")},
        ],
    }  # fmt: skip


@pytest.mark.parametrize("events", [CUT_CALL, [Part(0, "The answer is")]])
def test_what_was_cut_is_incomplete(events: list[Event]) -> None:
    frames = frames_of(events, end("length"))
    assert frames[-1]["type"] == "response.incomplete"
    response = whole(iter(frames))
    assert isinstance(response, dict)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["incomplete"]
    if events is CUT_CALL:
        assert response["output"][0]["arguments"] == '{"ci'


def test_an_empty_answer_is_a_message() -> None:
    response = whole(iter(frames_of([])))
    assert isinstance(response, dict)
    (message,) = response["output"]
    assert message["content"][0]["text"] == ""


def test_logprobs_come_with_their_text() -> None:
    frames = frames_of(
        [
            Part(0, "hm", reasoning=True, tokens=(TokenLogprob(9, -1.0),)),
            Part(0, "", tokens=(TokenLogprob(1, -1.0),)),
            Part(0, "a", tokens=(TokenLogprob(2, -1.0),)),
            Part(0, "", tokens=(TokenLogprob(3, -1.0),)),
        ]
    )
    deltas = [
        frame["logprobs"] for frame in frames if frame["type"] == "response.output_text.delta"
    ]
    assert deltas == [[{"token": "1"}, {"token": "2"}]]
    (done,) = [
        frame["logprobs"] for frame in frames if frame["type"] == "response.output_text.done"
    ]
    assert done == [{"token": "1"}, {"token": "2"}, {"token": "3"}]
    assert all(frame.get("delta") != "" for frame in frames)


def test_what_is_sent() -> None:
    writer = Writer(made_frames())
    start = writer.start().decode().split("\n\n")
    assert [part.splitlines()[0] for part in start if part] == [
        "event: response.created",
        "event: response.in_progress",
    ]
    assert writer.silence().startswith(b":")
    assert writer.end() == b"data: [DONE]\n\n"
    failed = writer.failed(ApiError(status=503, message="no", code="unavailable")).decode()
    bodies = [json.loads(line[6:]) for line in failed.splitlines() if line.startswith("data: {")]
    assert [body["type"] for body in bodies] == ["response.failed", "error"]
    assert bodies[0]["response"]["error"] == {"code": "unavailable", "message": "no"}
    assert bodies[1]["error"]["message"] == bodies[1]["message"] == "no"
    assert failed.endswith("data: [DONE]\n\n")
