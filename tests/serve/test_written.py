"""What dialects write, read by the clients: calls, thoughts, signs of life, and a reply that breaks off."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import count
from typing import Any

import anthropic
import httpx
import httpx2
import ollama
import openai
import pytest

from outsize.serve import anthropic_events, ollama_events, responses_events
from outsize.serve.errors import ApiError
from outsize.serve.events import Event
from outsize.serve.sse import Writer
from tests.serve.replies import CALLS, THOUGHTS, end

BROKE_OFF = ApiError(status=500, message="the disk is gone")
HEAD = {
    "id": "resp_1", "object": "response", "created_at": 1, "model": "m", "instructions": None, "tools": [],
    "tool_choice": "auto", "parallel_tool_calls": True, "temperature": 0.0, "top_p": 1.0, "metadata": {},
}  # fmt: skip


def written(writer: Writer, events: Iterable[Event], error: ApiError | None = None) -> bytes:
    """A stream, with a sign of life before each event."""
    text = writer.start()
    for event in events:
        text += writer.silence() + writer.write(event)
    return text + (writer.end() if error is None else writer.failed(error))


def for_claude() -> Writer:
    return anthropic_events.Writer(anthropic_events.Frames("msg_1", "m", 11), "req_1")


def for_openai() -> Writer:
    numbers = count(1)

    def usage(last: Event) -> dict[str, object]:
        details = {"input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}}
        details["output_tokens_details"] = {"reasoning_tokens": 0}
        return {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18, **details}

    kit = responses_events.Kit(lambda p: f"{p}{next(numbers)}", time.time, usage, lambda part: [])
    return responses_events.Writer(responses_events.Frames(dict(HEAD), kit))


def for_ollama() -> Writer:
    return ollama_events.Writer(ollama_events.Frames("m", "2026-01-01T00:00:00Z", is_chat=True))


def answer(text: bytes, kind: str) -> Any:
    """What stands in for a server: one answer to everything, for httpx or its successor."""

    def of(library: Any) -> Any:
        headers = {"content-type": kind}
        return library.MockTransport(lambda _: library.Response(200, content=text, headers=headers))

    return of


def claude_reads(text: bytes) -> Any:
    transport = answer(text, "text/event-stream")(httpx2)
    with (
        anthropic.Anthropic(
            api_key="x", max_retries=0, http_client=httpx2.Client(transport=transport),
            _strict_response_validation=True,
        ) as client,
        client.messages.stream(
            model="m", max_tokens=9, messages=[{"role": "user", "content": "x"}]
        ) as stream,
    ):  # fmt: skip
        return stream.get_final_message()


def openai_reads(text: bytes) -> Any:
    transport = answer(text, "text/event-stream")(httpx2)
    with (
        openai.OpenAI(
            api_key="x", max_retries=0, http_client=httpx2.Client(transport=transport),
            _strict_response_validation=True,
        ) as client,
        client.responses.stream(model="m", input="x") as stream,
    ):  # fmt: skip
        return stream.get_final_response()


def ollama_reads(text: bytes) -> list[Any]:
    transport = answer(text, "application/x-ndjson")(httpx)
    with ollama.Client("http://127.0.0.1:1", transport=transport) as client:
        return list(client.chat("m", messages=[{"role": "user", "content": "x"}], stream=True))


def test_claude_reads_thoughts_and_calls() -> None:
    message = claude_reads(written(for_claude(), [*THOUGHTS, *CALLS, end("tool_calls")]))
    assert message.stop_reason == "tool_use"
    thought, said, first, second = message.content
    assert (thought.thinking, thought.signature) == ("Let me see.", "")
    assert said.text == "42Look. "
    assert (first.id, first.name, first.input) == ("call_1", "weather", {"city": "Köln"})
    assert (second.id, second.name, second.input) == ("call_2", "time", {})
    assert (message.usage.input_tokens, message.usage.output_tokens) == (11, 7)


def test_openai_reads_thoughts_and_calls() -> None:
    response = openai_reads(written(for_openai(), [*THOUGHTS, *CALLS, end("tool_calls")]))
    thought, said, first, second = response.output
    assert thought.content[0].text == "Let me see."
    assert said.content[0].text == response.output_text == "42Look. "
    assert (first.call_id, first.name, first.arguments) == ("call_1", "weather", '{"city": "Köln"}')
    assert (second.call_id, second.name, second.arguments) == ("call_2", "time", "{}")
    assert response.status == "completed"


def test_ollama_reads_thoughts_and_calls() -> None:
    parts = ollama_reads(written(for_ollama(), [*THOUGHTS, *CALLS, end("tool_calls")]))
    assert "".join(part.message.thinking or "" for part in parts) == "Let me see."
    assert "".join(part.message.content or "" for part in parts) == "42Look. "
    calls = [call.function for part in parts for call in part.message.tool_calls or []]
    assert [(call.name, call.arguments) for call in calls] == [
        ("weather", {"city": "Köln"}),
        ("time", {}),
    ]
    assert (parts[-1].done, parts[-1].done_reason) == (True, "stop")


def test_clients_notice_that_a_reply_broke_off() -> None:
    with pytest.raises(anthropic.APIError, match="disk is gone"):
        claude_reads(written(for_claude(), THOUGHTS, BROKE_OFF))
    with pytest.raises(openai.APIError, match="disk is gone"):
        openai_reads(written(for_openai(), THOUGHTS, BROKE_OFF))
    with pytest.raises(ollama.ResponseError, match="disk is gone"):
        ollama_reads(written(for_ollama(), THOUGHTS, BROKE_OFF))
