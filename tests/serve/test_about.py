"""What a server tells of itself: metrics, its description, its tokenizer."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from tests.serve.ask import CHAT, asked, chat, refused
from tests.serve.conftest import Running


def numbers(client: httpx.Client) -> dict[str, float]:
    """Prometheus's lines, each checked against the format."""
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    made = {}
    for line in reply.text.splitlines():
        if not line.startswith("#"):
            found = re.fullmatch(
                r'([a-z_]+(?:{[a-z]+="[^"]*"(?:,[a-z]+="[^"]*")*})?) ([-+.e\d]+)', line
            )
            assert found is not None, line
            made[found[1]] = float(found[2])
    return made


def test_metrics(client: httpx.Client) -> None:
    before = numbers(client)
    asked(client, CHAT, chat())
    refused(client, CHAT, {})
    after = numbers(client)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more('outsize_requests_total{dialect="openai",status="200"}') == 2  # and /metrics itself
    assert more('outsize_requests_total{dialect="openai",status="400"}') == 1
    assert more("outsize_new_tokens_total") == 5
    assert more("outsize_prompt_tokens_total") > 0
    assert more("outsize_first_token_seconds_count") == 1
    assert more('outsize_first_token_seconds_bucket{le="+Inf"}') == 1
    assert after["outsize_ready"] == 1
    assert after["outsize_cached_tokens_total"] >= 0
    assert after["outsize_accepted_tokens_total"] <= after["outsize_drafted_tokens_total"]
    assert after["outsize_running"] == after["outsize_waiting"] == 0
    assert after["outsize_process_bytes"] > 1e6
    assert after["outsize_hit_rate"] <= 1


def test_every_route_is_described(client: httpx.Client, served: Running) -> None:
    told = client.get("/openapi.json").json()
    assert told["openapi"].startswith("3.1")
    assert {"/v1/chat/completions", "/v1/models/{name}", "/tokenize", "/health"} <= set(
        told["paths"]
    )
    body = told["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].rpartition("/")[2]
    schema = told["components"]["schemas"][name]
    assert schema["additionalProperties"] is False
    assert {"messages", "logit_bias", "stream_options"} <= set(schema["properties"])
    references = re.findall(r'"#/components/schemas/(\w+)"', client.get("/openapi.json").text)
    assert set(references) <= set(told["components"]["schemas"])


@pytest.mark.parametrize(
    ("body", "tokens"),
    [({"prompt": "AB"}, "AB"), ({"content": "AB"}, "AB"), ({"prompt": ""}, ""),
     ({"prompt": "<s>", "parse_special": False}, "<s>")],
)  # fmt: skip
def test_tokenize(client: httpx.Client, body: Any, tokens: str) -> None:
    body = {**body, "add_special_tokens": False}
    made = asked(client, "/tokenize", body)
    assert made["count"] == len(made["tokens"]) == len(tokens)
    pieces = asked(client, "/tokenize", {**body, "with_pieces": True})["tokens"]
    assert [piece["id"] for piece in pieces] == made["tokens"]
    assert "".join(piece["piece"] for piece in pieces) == tokens
    back = asked(client, "/detokenize", {"tokens": made["tokens"]})
    assert back == {"prompt": tokens, "content": tokens}


def test_tokenize_more(client: httpx.Client) -> None:
    for name in (
        "prompt",
        "content",
    ):  # of control tokens names are read, as vLLM's and llama.cpp's servers do
        assert asked(client, "/tokenize", {name: "a<s>", "add_special": False})["tokens"][1:] == [
            256
        ]
    messages = chat()["messages"]
    made = asked(client, "/tokenize", {"messages": messages})
    assert made["count"] == asked(client, CHAT, chat())["usage"]["prompt_tokens"]
    halves = asked(client, "/tokenize", {"prompt": "é", "with_pieces": True})["tokens"]
    assert [piece["piece"] for piece in halves[-2:]] == [[0xC3], [0xA9]]
    refused(client, "/tokenize", {"messages": messages, "add_generation_prompt": False})
    refused(client, "/tokenize", {})
    refused(client, "/tokenize", {"prompt": "a", "content": "b"})
    refused(client, "/tokenize", {"prompt": "a", "model": "none"}, 404)
    refused(client, "/detokenize", {"tokens": [288]})
    refused(client, "/detokenize", {"tokens": ["a"]})


def test_the_tokenizer(client: httpx.Client) -> None:
    told = client.get("/tokenizer_info").json()
    assert told["eos_token"] == "</s>"
    assert told["eos_token_ids"] == [257]
    assert told["vocab_size"] == 288
    assert "messages" in told["chat_template"]


def test_embeddings(client: httpx.Client) -> None:
    error = refused(client, "/v1/embeddings", {"input": "a", "encoding_format": "base64"})
    assert "has no embeddings" in error["message"]
