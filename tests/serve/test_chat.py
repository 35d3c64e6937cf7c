"""OpenAI's chat completions, over a plain connection and through OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from tests.serve.ask import CHAT, asked, chat, refused, stop_in, streamed
from tests.serve.conftest import Running


@pytest.fixture
def sdk(served: Running) -> openai.OpenAI:
    """OpenAI's client, which checks what it is sent."""
    return openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    )


MESSAGES: Any = [{"role": "user", "content": "hello"}]


def test_an_answer_has_everything(client: httpx.Client, served: Running) -> None:
    made = asked(client, CHAT, chat())
    assert made["id"].startswith("chatcmpl-")
    assert made["object"] == "chat.completion"
    assert made["model"] == served.host.name
    assert made["system_fingerprint"].startswith("b")
    assert made["service_tier"] == "default"
    (choice,) = made["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    used = made["usage"]
    assert used["completion_tokens"] == 5
    assert used["total_tokens"] == used["prompt_tokens"] + 5
    assert set(used["prompt_tokens_details"]) == {"cached_tokens"}
    assert used["completion_tokens_details"]["reasoning_tokens"] == 0
    assert used["outsize"]["first_token_s"] > 0


def test_a_lazy_answer_says_so(client: httpx.Client) -> None:
    words = [{"role": "user", "content": "hello there " * 9}]
    used = asked(client, CHAT, chat(messages=words, prefill="lazy:fast"))["usage"]["outsize"]
    assert used["lossy"]
    assert 0.2 < used["computed_share"] < 0.9
    used = asked(client, CHAT, chat(messages=words))["usage"]["outsize"]
    assert (used["lossy"], used["computed_share"]) == (False, 1.0)


def test_the_order_of_a_stream(client: httpx.Client) -> None:
    chunks = streamed(client, CHAT, chat(n=2, temperature=1, seed=7))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len({chunk["created"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [c["index"] for c in choices[:2]] == [0, 1]
    for number in range(2):
        mine = [c for c in choices if c["index"] == number]
        assert mine[0]["delta"] == {"role": "assistant", "content": None}
        assert all("role" not in c["delta"] for c in mine[1:])
        assert all(c["delta"]["content"] for c in mine[1:-1])  # never empty
        assert mine[-1]["delta"] == {}
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"]


def text_of(chunks: list[Any], number: int = 0) -> str:
    """What a stream said."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(c["delta"].get("content") or "" for c in choices if c["index"] == number)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_the_same(client: httpx.Client, n: int) -> None:
    body = chat(n=n, temperature=1.5, seed=3, max_tokens=20)
    whole = asked(client, CHAT, body)
    chunks = streamed(client, CHAT, body)
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert texts == [text_of(chunks, i) for i in range(n)]
    assert len(set(texts)) == n
    assert [choice["index"] for choice in whole["choices"]] == list(range(n))


def test_choice_i_has_the_seed_and_i(client: httpx.Client) -> None:
    body = chat(temperature=1.5, max_tokens=12)
    two = asked(client, CHAT, {**body, "n": 2, "seed": 4})["choices"]
    alone = [asked(client, CHAT, {**body, "seed": seed})["choices"][0] for seed in (4, 5)]
    assert [c["message"] for c in two] == [c["message"] for c in alone]


def test_usage_comes_only_where_it_is_asked_for(client: httpx.Client) -> None:
    chunks = streamed(client, CHAT, chat(stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
    for given in (None, {"include_usage": False}, {"include_usage": None}, {}):
        chunks = streamed(client, CHAT, chat(stream_options=given))
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_the_default_length_is_the_context(client: httpx.Client, served: Running) -> None:
    made = asked(client, CHAT, chat(max_tokens=None, ignore_eos=True))
    assert made["usage"]["total_tokens"] == served.host.context
    assert made["choices"][0]["finish_reason"] == "length"


def test_the_smaller_limit_holds(client: httpx.Client) -> None:
    made = asked(client, CHAT, chat(max_tokens=9, max_completion_tokens=3))
    assert made["usage"]["completion_tokens"] == 3


def test_too_long_a_prompt_says_both_numbers(client: httpx.Client, served: Running) -> None:
    error = refused(client, CHAT, chat("x" * 600))
    assert error["code"] == "context_length_exceeded"
    assert f"{served.host.context:,}" in error["message"]
    assert "6" in error["message"]


def test_stop_strings(client: httpx.Client) -> None:
    full = asked(client, CHAT, chat(max_tokens=30))["choices"][0]["message"]["content"]
    stop = stop_in(full)
    body = chat(max_tokens=30, stop=[stop, "never said"])
    made = asked(client, CHAT, body)["choices"][0]
    assert made["message"]["content"] == full[: full.index(stop)]
    assert made["finish_reason"] == "stop"
    assert text_of(streamed(client, CHAT, body)) == full[: full.index(stop)]
    assert asked(client, CHAT, chat(max_tokens=30, stop=stop))["choices"][0] == made


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "developer", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
        [{"role": "system", "content": "a"}] * 2 + [{"role": "user", "content": "b"}] * 2,
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": None},
         {"role": "user", "content": "b", "name": "Ann"}],
        [{"role": "user", "content": "a"},
         {"role": "assistant", "content": None, "tool_calls": [
             {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
         {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "b"}]}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "reasoning": "c"},
         {"role": "function", "name": "f", "content": "d"}],
        [{"role": "user", "content": ""}],
    ],
)  # fmt: skip
def test_every_shape_of_message(client: httpx.Client, messages: Any) -> None:
    asked(client, CHAT, chat(messages=messages, tools=None))


@pytest.mark.parametrize(
    "messages",
    [None, "text", [], [123], [None], [{}], [{"role": 123}], [{"role": "user"}],
     [{"role": "user", "content": 123}], [{"role": "none", "content": "a"}],
     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}],
     [{"role": "user", "content": [{"type": "video"}]}], [{"role": "user", "content": ["a"]}],
     [{"role": "user", "content": "a", "tool_calls": [
         {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}],
     [{"role": "assistant", "content": "a", "audio": {"id": "b"}}],
     [{"role": "user", "content": "a"}] * 50_001],
)  # fmt: skip
def test_bad_messages(client: httpx.Client, messages: Any) -> None:
    error = refused(client, CHAT, {"messages": messages, "max_tokens": 1})
    assert (error["param"] or "").startswith("messages")


def test_the_clients_calls(sdk: openai.OpenAI) -> None:
    """The client's stream helper raises at a reply that is cut: so this one ends by a stop string."""
    create = sdk.chat.completions.create
    full = (
        create(model="other", messages=MESSAGES, max_tokens=20, temperature=0)
        .choices[0]
        .message.content
    )
    assert full
    stop = stop_in(full)
    made = create(model="other", messages=MESSAGES, max_tokens=20, temperature=0, stop=stop)
    assert made.model == "other"
    assert made.choices[0].message.content == full[: full.index(stop)]
    with sdk.chat.completions.stream(
        model="other", messages=MESSAGES, max_tokens=20, temperature=0, stop=stop,
        stream_options={"include_usage": True},
    ) as stream:  # fmt: skip
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == made.choices[0].message.content
    assert final.choices[0].message.role == "assistant"
    assert final.usage is not None
    assert made.usage is not None
    assert final.usage.completion_tokens == made.usage.completion_tokens


def test_the_clients_models(sdk: openai.OpenAI, served: Running) -> None:
    assert {model.id for model in sdk.models.list()} == {served.host.name, "other"}
    assert sdk.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError) as error:
        sdk.models.retrieve("none")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="writes texts and has no embeddings"):
        sdk.embeddings.create(model="other", input="a")


def test_the_asynchronous_client(served: Running) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as sdk:
            create = sdk.chat.completions.create
            each = [
                create(model="other", messages=MESSAGES, max_tokens=4, seed=i) for i in range(5)
            ]
            return [made.choices[0].message.content or "" for made in await asyncio.gather(*each)]

    assert len(asyncio.run(ask())) == 5


def test_log_probabilities(client: httpx.Client) -> None:
    body = chat(max_tokens=12, logprobs=True, top_logprobs=3)
    choice = asked(client, CHAT, body)["choices"][0]
    found = choice["logprobs"]["content"]
    assert len(found) == 12
    joined = b"".join(bytes(one["bytes"] or ()) for one in found)
    assert joined.decode("utf-8", "replace").startswith(choice["message"]["content"])
    for one in found:
        top = one["top_logprobs"]
        assert len(top) == 3
        assert top[0] == {k: one[k] for k in ("token", "logprob", "bytes")}  # at temperature 0
        assert top == sorted(top, key=lambda t: -t["logprob"])
    chunks = streamed(client, CHAT, body)
    parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [one for part in parts for one in part["content"]] == found


def test_log_probabilities_without_others(client: httpx.Client) -> None:
    for more in ({}, {"top_logprobs": 0}):
        choice = asked(client, CHAT, chat(logprobs=True, **more))["choices"][0]
        assert all(one["top_logprobs"] == [] for one in choice["logprobs"]["content"])
    assert asked(client, CHAT, chat(logprobs=False))["choices"][0]["logprobs"] is None
    assert refused(client, CHAT, chat(top_logprobs=2))["param"] == "top_logprobs"
    assert refused(client, CHAT, chat(logprobs=True, top_logprobs=21))["param"] == "top_logprobs"


def test_log_probabilities_stop_where_the_text_stops(client: httpx.Client) -> None:
    full = asked(client, CHAT, chat(max_tokens=30))["choices"][0]["message"]["content"]
    body = chat(max_tokens=30, logprobs=True, stop=stop_in(full))
    choice = asked(client, CHAT, body)["choices"][0]
    joined = b"".join(bytes(one["bytes"] or ()) for one in choice["logprobs"]["content"])
    assert joined.decode("utf-8", "replace") == choice["message"]["content"]


def test_a_schema(client: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"ä": {"const": "grün"}},
        "required": ["ä"],
        "additionalProperties": False,
    }
    given = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    made = asked(client, CHAT, chat(response_format=given, max_tokens=100))["choices"][0]
    assert json.loads(made["message"]["content"]) == {"ä": "grün"}
    assert made["finish_reason"] == "stop"
    assert "\ufffd" not in json.dumps(
        streamed(client, CHAT, chat(response_format=given, max_tokens=100)), ensure_ascii=False
    )


def test_any_object(client: httpx.Client) -> None:
    made = asked(client, CHAT, chat(response_format={"type": "json_object"}, max_tokens=8))
    assert made["choices"][0]["message"]["content"].lstrip().startswith("{")
    assert asked(client, CHAT, chat(response_format={"type": "text"}))["choices"]


@pytest.mark.parametrize(
    "given",
    [{"type": "xml"}, {}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "a"}},
     {"type": "json_schema", "json_schema": {"schema": {"type": 123}}},
     {"type": "json_schema", "json_schema": {"schema": {"type": "hiccup"}}}],
)  # fmt: skip
def test_bad_formats(client: httpx.Client, given: Any) -> None:
    refused(client, CHAT, chat(response_format=given))
