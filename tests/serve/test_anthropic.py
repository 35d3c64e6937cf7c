"""Anthropic's own client against a running server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from tests.serve.conftest import Running

HI = [{"role": "user", "content": "hello"}]
WEATHER = {"name": "weather", "input_schema": {"type": "object"}}


@pytest.fixture
def claude(served: Running) -> Iterator[Any]:
    """Sync; strict, so that every answer must be of the client's own types."""
    with anthropic.Anthropic(
        base_url=served.url, api_key="x", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


def ask(**more: Any) -> dict[str, Any]:
    """Keywords for the client, which has no temperature any more."""
    greedy = {"extra_body": {"temperature": 0}}
    return {"model": "other", "max_tokens": 5, "messages": HI, **greedy, **more}


def body(**more: Any) -> dict[str, Any]:
    return {"model": "other", "max_tokens": 5, "messages": HI, "temperature": 0, **more}


def test_a_message(claude: Any) -> None:
    message = claude.messages.create(**ask())
    assert message.id.startswith("msg_")
    assert message._request_id.startswith("req_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "other")
    assert message.stop_reason == "max_tokens"
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text
    assert message.usage.output_tokens == 5
    assert message.usage.cache_read_input_tokens == 0


def test_a_stream_brings_the_same(claude: Any) -> None:
    whole = claude.messages.create(**ask(system="Be brief."))
    with claude.messages.stream(**ask(system="Be brief.")) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_the_asynchronous_client(served: Running, claude: Any) -> None:
    async def both() -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=served.url, api_key="x") as made:
            whole = await made.messages.create(**ask())
            async with made.messages.stream(**ask()) as stream:
                return whole.content[0].text, await stream.get_final_text()

    whole, streamed = asyncio.run(both())
    assert whole == streamed == claude.messages.create(**ask()).content[0].text


def test_events_are_in_order(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/messages", json=body(stream=True)) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        frames = stream.read().decode().split("\n\n")
    assert frames.pop() == ""
    events = []
    for frame in frames:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    kinds = [event["type"] for event in events if event["type"] != "ping"]
    deltas = kinds.count("content_block_delta")
    assert deltas >= 1
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["usage"]["input_tokens"] > 0


def test_count_tokens(claude: Any) -> None:
    more = {"system": "Be brief.", "messages": [*HI, {"role": "assistant", "content": "Hi"}, *HI]}
    counted = claude.messages.count_tokens(model="other", **more)
    assert counted.to_dict() == {"input_tokens": counted.input_tokens}
    assert claude.messages.create(**ask(**more)).usage.input_tokens == counted.input_tokens


def test_a_stop_sequence(claude: Any) -> None:
    text = claude.messages.create(**ask(max_tokens=12)).content[0].text
    stop = text[3:5]
    message = claude.messages.create(**ask(max_tokens=12, stop_sequences=[stop]))
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == text[: text.index(stop)]


def test_turns_with_tools_thoughts_and_a_system_message_inside(claude: Any) -> None:
    messages = [
        *HI,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Köln"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}]},
                {"type": "text", "text": "Well?"},
            ],
        },
        {"role": "system", "content": "Be brief."},
    ]  # fmt: skip
    assert claude.messages.create(**ask(messages=messages)).content


def test_models(claude: Any) -> None:
    page = claude.models.list()
    assert page.data[-1].id == "other"
    assert (page.first_id, page.last_id) == (page.data[0].id, "other")
    assert not page.has_more
    assert claude.models.retrieve("other").display_name == "other"


@pytest.mark.parametrize(
    ("fields", "status", "kind", "words"),
    [
        ({"model": "nobody"}, 404, "not_found_error", "known are"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens is 0"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "invalid_request_error", "512"),
        ({"container": "c"}, 400, "invalid_request_error", "container"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_errors(
    claude: Any, fields: dict[str, Any], status: int, kind: str, words: str, stream: bool
) -> None:
    with pytest.raises(anthropic.APIStatusError, match=words) as caught:
        claude.messages.create(**ask(stream=stream, **fields))
    assert caught.value.status_code == status
    told = caught.value.body
    assert isinstance(told, dict)
    assert (told["type"], told["error"]["type"]) == ("error", kind)
    assert told["request_id"] == caught.value.response.headers["x-request-id"]
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_a_prompt_that_is_too_long_is_never_cut(claude: Any) -> None:
    long = [{"role": "user", "content": "word " * 600}]
    size = claude.messages.count_tokens(model="other", messages=long).input_tokens
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(**ask(messages=long))
    said, room = (
        int(n.replace(",", "")) for n in re.findall(r"[\d,]+(?= tokens|;)", str(caught.value))
    )
    assert (said - size in (0, 1), room) == (True, 512), "with the first token of a reply"


def test_what_has_no_effect_is_said(client: httpx.Client) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    answer = client.post("/v1/messages", json=body(thinking=thinking))
    assert answer.status_code == 200
    assert answer.headers["x-outsize-ignored"] == "thinking"
