"""Ollama's chat and generate: from bodies to what the engine is asked for, from events to lines."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from outsize.options import Options
from outsize.sampling.logprobs import TokenLogprob
from outsize.serve.ask import Ask
from outsize.serve.errors import ApiError
from outsize.serve.events import Event, Part
from outsize.serve.ollama_events import Frame, Frames, Writer, whole
from outsize.serve.ollama_models import known_as, shown_count
from outsize.serve.ollama_request import (
    chat_ask,
    generate_ask,
    keeps_for,
    only_loads,
    without_effect,
)
from outsize.serve.ollama_schema import Chat, Generate
from outsize.serve.schema import read
from tests.serve.replies import CALLS, CUT_CALL, THOUGHTS, end

CONTEXT = 4096
UNSAID = Options(max_tokens=1 << 24, temperature=0.8, top_p=0.9, min_p=0.0)
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def chat(**fields: object) -> Chat:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return read(json.dumps(body).encode(), Chat, lenient=False)[0]


def generate(**fields: object) -> Generate:
    body = {"model": "m", "prompt": "hi", **fields}
    return read(json.dumps(body).encode(), Generate, lenient=False)[0]


def asked(**fields: object) -> Ask:
    return chat_ask(chat(**fields), CONTEXT)


def test_what_is_not_said() -> None:
    ask = asked(options=None, format=None, think=None, tools=None, stream=None, keep_alive=None)
    assert ask.options == UNSAID
    assert ask.prompt == [{"role": "user", "content": "hi"}]
    assert ask.stream, "where it is not said"
    assert not asked(stream=False).stream


def test_options() -> None:
    given = {
        "temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 7, "num_predict": 9,
        "stop": ["a", "b"], "repeat_penalty": 1.1, "repeat_last_n": 32, "presence_penalty": 0.5,
        "frequency_penalty": 0.25, "num_ctx": CONTEXT, "mirostat": 0, "tfs_z": 1.0, "typical_p": 1,
        "penalize_newline": True,
    }  # fmt: skip
    assert asked(options=given).options == Options(
        max_tokens=9, temperature=0.0, top_k=5, top_p=0.5, min_p=0.1, seed=7, stop=("a", "b"),
        repeat_penalty=1.1, repeat_last_n=32, presence_penalty=0.5, frequency_penalty=0.25,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"num_predict": -1}, "max_tokens", 1 << 24),
        ({"num_predict": -2}, "max_tokens", 1 << 24),
        ({"seed": -1}, "seed", None),
        ({"seed": 0}, "seed", 0),
        ({"stop": "x"}, "stop", ("x",)),
        ({"repeat_last_n": -1}, "repeat_last_n", -1),
    ],
)
def test_values_that_mean_something_else(options: Any, name: str, value: object) -> None:
    assert getattr(asked(options=options).options, name) == value


@pytest.mark.parametrize(
    ("format", "schema"), [("", None), ("json", {"type": "object"}), (SCHEMA, SCHEMA)]
)
def test_formats(format: object, schema: object) -> None:
    assert asked(format=format).options.schema == schema


@pytest.mark.parametrize(
    ("think", "arguments"),
    [
        (True, {"enable_thinking": True, "thinking": True}),
        (False, {"enable_thinking": False, "thinking": False}),
        ("high", {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}),
    ],
)
def test_thinking_is_the_templates(think: object, arguments: dict[str, object]) -> None:
    assert asked(think=think).options.template_args == arguments


def test_logprobs() -> None:
    assert asked(logprobs=True).options.logprobs == 0
    assert asked(logprobs=True, top_logprobs=3).options.logprobs == 3
    assert asked(logprobs=False, top_logprobs=0).options.logprobs is None


def test_tools_their_calls_and_results() -> None:
    function = {"name": "weather", "description": "x", "parameters": SCHEMA}
    call = {"function": {"name": "weather", "arguments": {"city": "Köln"}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "thinking": "A tool.", "tool_calls": [{"id": "c1", **call}]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        {"role": "TOOL", "content": "12:00", "tool_name": "time"},
    ]  # fmt: skip
    ask = asked(messages=messages, tools=[{"type": "function", "function": function}])
    assert ask.tools == ({"type": "function", "function": function},)
    assert ask.prompt == [
        messages[0],
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "A tool.",
            "tool_calls": [{"id": "c1", "type": "function", **call}],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "weather"},
        {"role": "tool", "content": "12:00", "name": "time"},
    ]


def test_a_call_without_an_id_gets_one() -> None:
    call = {"function": {"name": "weather"}}
    ask = asked(messages=[{"role": "assistant", "tool_calls": [call]}])
    (message,) = ask.prompt
    assert isinstance(message, dict)
    assert re.fullmatch("call_[0-9a-f]{24}", message["tool_calls"][0]["id"])
    assert not ask.options.continue_final


def test_a_last_message_of_the_assistant_is_gone_on_with() -> None:
    said = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is"}]
    assert asked(messages=said).options.continue_final


def test_generate() -> None:
    ask = generate_ask(generate(system="Be brief."), CONTEXT)
    assert ask.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    raw = generate_ask(generate(raw=True, system=""), CONTEXT)
    assert (raw.prompt, raw.options.raw) == ("hi", True)


def test_what_only_loads() -> None:
    assert only_loads(chat(messages=[]))
    assert only_loads(chat(messages=None))
    assert only_loads(generate(prompt=""))
    assert not only_loads(generate(prompt=" "))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *((n, n) for n in (None, 0, 30, 1.5)),
        *(("0", 0), ("5m", 300), ("1h30m", 5400), ("-1m", -60), ("250ms", 0.25)),
    ],
)
def test_keep_alive(value: float | str | None, seconds: float | None) -> None:
    assert keeps_for(value) == seconds


@pytest.mark.parametrize("value", ["", "m", "5", "5 m", "forever", "5m;"])
def test_keep_alive_that_is_no_duration(value: str) -> None:
    with pytest.raises(ApiError, match="5m"):
        keeps_for(value)


def test_options_of_a_machine_are_named() -> None:
    body = chat(options={"num_gpu": 0, "use_mmap": True, "num_keep": None, "temperature": 0})
    assert without_effect(body) == ["options.num_gpu", "options.use_mmap"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"options": {"num_ctx": CONTEXT + 1}}, "options.num_ctx", "4,097.*4,096"),
        ({"options": {"num_predict": 0}}, "options.num_predict", "at least 1"),
        ({"options": {"num_predict": -3}}, "options.num_predict", "-2"),
        ({"options": {"mirostat": 1}}, "options.mirostat", "0"),
        ({"options": {"tfs_z": 0.5}}, "options.tfs_z", "1"),
        ({"options": {"typical_p": 0.5}}, "options.typical_p", "1"),
        ({"options": {"penalize_newline": False}}, "options.penalize_newline", "true"),
        ({"options": {"tempature": 1}}, "options.tempature", "did you mean 'temperature'"),
        ({"options": {"stop": [""]}}, "options.stop", "empty"),
        ({"truncate": True}, "truncate", "never cuts"),
        ({"shift": True}, "shift", "never cuts"),
        ({"format": "xml"}, "format", "json"),
        ({"think": "a lot"}, "think", "low, medium, high"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "robot"),
        ({"messages": [{"role": "user", "images": ["AA"]}]}, "messages.0.images", "reads text"),
        ({"_debug_render_only": True}, "_debug_render_only", "false"),
        ({"tool": []}, "tool", "did you mean 'tools'"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        asked(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert re.search(words, caught.value.message), caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "}"}, "suffix"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"images": ["AA=="]}, "images"),
        ({"width": 512}, "width"),
        ({"raw": True, "system": "x"}, "system"),
    ],
)
def test_refusals_of_generate(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        generate_ask(generate(**fields), CONTEXT)
    assert caught.value.param == param


def lines(events: list[Event], last: Event | None = None, is_chat: bool = True) -> list[Frame]:
    frames = Frames("m", "2026-01-01T00:00:00Z", is_chat)
    return [frame for event in [*events, last or end()] for frame in frames.of(event)]


HEAD = {"model": "m", "created_at": "2026-01-01T00:00:00Z"}


def test_lines_of_a_chat() -> None:
    first, second, third, fourth, last = lines(THOUGHTS)
    assert first == {
        **HEAD, "message": {"role": "assistant", "content": "", "thinking": "Let me "}, "done": False,
    }  # fmt: skip
    assert second["message"] == {"role": "assistant", "content": "", "thinking": "see."}
    assert third == {**HEAD, "message": {"role": "assistant", "content": "4"}, "done": False}
    assert fourth["message"] == {"role": "assistant", "content": "2"}
    assert {k: v for k, v in last.items() if k != "outsize"} == {
        **HEAD, "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop",
        "total_duration": 2_500_000_000, "load_duration": 0, "prompt_eval_count": 11,
        "prompt_eval_duration": 500_000_000, "eval_count": 7, "eval_duration": 2_000_000_000,
    }  # fmt: skip


def test_lines_of_generate() -> None:
    frames = Frames("m", HEAD["created_at"], is_chat=False)
    frames.context = lambda text: [1, 2, len(text)]
    made = [frame for event in [*THOUGHTS, end("length")] for frame in frames.of(event)]
    assert made[0] == {**HEAD, "response": "", "thinking": "Let me ", "done": False}
    assert made[2] == {**HEAD, "response": "4", "done": False}
    assert (made[-1]["response"], made[-1]["done_reason"]) == ("", "length")
    assert made[-1]["context"] == [1, 2, 2]


def test_calls_are_whole() -> None:
    text, first, second, last = lines(CALLS, end("tool_calls"))
    assert text["message"] == {"role": "assistant", "content": "Look. "}
    call = {"index": 0, "name": "weather", "arguments": {"city": "Köln"}}
    assert first["message"] == {
        "role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "function": call}],
    }  # fmt: skip
    assert isinstance(second["message"], dict)
    assert second["message"]["tool_calls"][0]["function"]["name"] == "time"
    assert (last["done"], last["done_reason"]) == (True, "stop")


def test_a_call_that_was_cut_is_text() -> None:
    text, last = lines(CUT_CALL, end("length"))
    assert text["message"] == {
        "role": "assistant",
        "content": '{"name": "weather", "arguments": {"ci',
    }
    assert last["done_reason"] == "length"


def test_a_whole_answer() -> None:
    made = whole(lines([*THOUGHTS, *CALLS], end("tool_calls")))
    message = made["message"]
    assert isinstance(message, dict)
    assert (message["thinking"], message["content"]) == ("Let me see.", "42Look. ")
    assert [call["id"] for call in message["tool_calls"]] == ["call_1", "call_2"]
    assert (made["done"], made["eval_count"]) == (True, 7)
    answer = whole(lines(THOUGHTS, is_chat=False))
    assert (answer["response"], answer["thinking"]) == ("42", "Let me see.")


def test_logprobs_come_with_their_text() -> None:
    frames = Frames("m", HEAD["created_at"], is_chat=True)
    frames.logprobs = lambda part: [
        {"token": str(t.token), "logprob": t.logprob} for t in part.tokens
    ]
    events = [
        Part(0, "a", tokens=(TokenLogprob(1, -1.0),)),
        Part(0, "", tokens=(TokenLogprob(2, -2.0), TokenLogprob(3, -3.0))),
        end(),
    ]
    made = [frame for event in events for frame in frames.of(event)]
    assert [frame.get("logprobs") for frame in made] == [
        [{"token": "1", "logprob": -1.0}],
        [{"token": "2", "logprob": -2.0}, {"token": "3", "logprob": -3.0}],
        None,
    ]
    told = whole(made)["logprobs"]
    assert isinstance(told, list)
    assert len(told) == 3


@pytest.mark.parametrize("is_chat", [True, False])
def test_what_is_sent(is_chat: bool) -> None:
    writer = Writer(Frames("m", HEAD["created_at"], is_chat))
    assert writer.start() == b""
    sign = json.loads(writer.silence())
    assert (sign["message"]["content"] if is_chat else sign["response"]) == ""
    assert not sign["done"]
    sent = [writer.silence(), *(writer.write(e) for e in [*CALLS, end()]), writer.end()]
    text = b"".join(sent).decode()
    assert "\n\n" not in text, "a blank line breaks the client"
    assert json.loads(text.splitlines()[-1])["done"]
    assert writer.failed(ApiError(status=500, message="no")) == b'{"error":"no"}\n'


def test_names_with_a_tag() -> None:
    assert known_as("m:latest", ["m"]) == "m"
    assert known_as("m:latest", ["m:latest"]) == "m:latest"
    assert known_as("m:7b", ["m"]) == "m:7b"
    assert known_as("", ["m"]) is None


def test_counts_of_weights() -> None:
    counts = [999, 25_000, 134_515_008, 7_241_732_096]
    assert [shown_count(n) for n in counts] == ["999", "25.0K", "134.5M", "7.2B"]
