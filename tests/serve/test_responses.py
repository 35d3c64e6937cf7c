"""OpenAI's own client against /v1/responses of a running server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import Running


@pytest.fixture
def client_of(served: Running) -> Iterator[Any]:
    """Sync; strict, so that every answer must be of the client's own types."""
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="x", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "other", "input": "hello", "max_output_tokens": 5, "temperature": 0, **more}


def test_a_response(client_of: Any) -> None:
    response = client_of.responses.create(
        **ask(instructions="Be brief.", metadata={"a": "b"}, store=True)
    )
    assert response.id.startswith("resp_")
    assert (response.object, response.model, response.status) == ("response", "other", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    (message,) = response.output
    assert message.id.startswith("msg_")
    assert response.output_text == message.content[0].text != ""
    assert response.usage.output_tokens == 5
    assert response.usage.total_tokens == response.usage.input_tokens + 5
    assert (response.store, response.metadata, response.truncation) == (
        False,
        {"a": "b"},
        "disabled",
    )


def test_a_stream_brings_the_same(client_of: Any) -> None:
    whole = client_of.responses.create(**ask())
    events = list(client_of.responses.create(**ask(stream=True)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert {e.response.id for e in events if hasattr(e, "response")} == {events[0].response.id}
    items = {e.item_id for e in events if hasattr(e, "item_id")}
    assert items == {e.item.id for e in events if hasattr(e, "item")}
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert all(deltas)
    final = events[-1].response
    assert "".join(deltas) == final.output_text == whole.output_text
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_the_helper_for_streams(client_of: Any) -> None:
    """It wants a response that is completed, so the model must end by itself: at a stop of its own."""
    for temperature in range(30):
        more = ask(temperature=1 + temperature / 30, max_output_tokens=400)
        with client_of.responses.stream(**more) as stream:
            kinds = [event.type for event in stream]
        if kinds[-1] == "response.completed":
            response = stream.get_final_response()
            assert response.status == "completed"
            assert response.completed_at >= response.created_at
            return
    pytest.fail("a random model ends sooner")


def test_the_asynchronous_client(served: Running, client_of: Any) -> None:
    async def both() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x") as made:
            whole = await made.responses.create(**ask())
            stream = await made.responses.create(**ask(stream=True))
            last = [event async for event in stream][-1]
            return whole.output_text, last.response.output_text

    whole, streamed = asyncio.run(both())
    assert whole == streamed == client_of.responses.create(**ask()).output_text


def test_logprobs(client_of: Any) -> None:
    format = {"type": "json_schema", "name": "x", "schema": {"const": "Käse \u2713"}}
    more = ask(top_logprobs=2, max_output_tokens=60, text={"format": format})
    whole = client_of.responses.create(**more)
    events = list(client_of.responses.create(**more, stream=True))
    told = whole.output[0].content[0].logprobs
    assert told
    assert [len(token.top_logprobs) for token in told] == [2] * len(told)
    assert events[-1].response.output[0].content[0].logprobs == told
    joined = b"".join(bytes(token.bytes) for token in told).decode()
    assert joined == whole.output_text == '"Käse \u2713"'
    shown = [t.token for e in events if e.type == "response.output_text.delta" for t in e.logprobs]
    assert shown == [token.token for token in told][: len(shown)]
    assert client_of.responses.create(**ask()).output[0].content[0].logprobs == []


def test_a_conversation_is_sent_whole(client_of: Any) -> None:
    first = client_of.responses.create(**ask())
    items = [
        {"role": "user", "content": "hello"},
        *first.output,
        {"role": "user", "content": "more"},
    ]
    second = client_of.responses.create(**ask(input=items))
    assert second.usage.input_tokens > first.usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"model": "nobody"}, 404, "model", "known are"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id", "keeps no responses"),
        ({"conversation": "conv_1"}, 400, "conversation", "keeps no responses"),
        ({"background": True}, 400, "background", "keeps no responses"),
        ({"input": "word " * 600}, 400, None, "tokens.*512"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(
    client_of: Any, fields: dict[str, Any], status: int, param: str, words: str, stream: bool
) -> None:
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        client_of.responses.create(**ask(stream=stream, **fields))
    error = caught.value
    assert (error.status_code, error.param) == (status, param)
    assert error.code
    assert error.type
    assert error.response.headers["x-should-retry"] == "false"


def test_the_path_without_a_version(client: httpx.Client) -> None:
    assert client.post("/responses", json=ask()).status_code == 200


def test_what_has_no_effect_is_said(client: httpx.Client) -> None:
    answer = client.post("/v1/responses", json=ask(reasoning={"effort": "low"}))
    assert answer.status_code == 200
    assert answer.headers["x-outsize-ignored"] == "reasoning.effort"
