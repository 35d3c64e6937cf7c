"""One model, four dialects: the same messages get the same answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from outsize.serve.errors import ApiError

SAID = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "more"},
]
SYSTEM = "Be brief."


def chat(ask: httpx.Client, size: int) -> str:
    messages = [{"role": "system", "content": SYSTEM}, *SAID]
    body = {"messages": messages, "max_tokens": size, "temperature": 0}
    text: str = ask.post("/v1/chat/completions", json=body).json()["choices"][0]["message"][
        "content"
    ]
    return text


def claude(ask: httpx.Client, size: int) -> str:
    body = {"system": SYSTEM, "messages": SAID, "max_tokens": size, "temperature": 0}
    return "".join(b["text"] for b in ask.post("/v1/messages", json=body).json()["content"])


def responses(ask: httpx.Client, size: int) -> str:
    body = {"instructions": SYSTEM, "input": SAID, "max_output_tokens": size, "temperature": 0}
    (message,) = ask.post("/v1/responses", json=body).json()["output"]
    return "".join(part["text"] for part in message["content"])


def llama(ask: httpx.Client, size: int) -> str:
    messages = [{"role": "system", "content": SYSTEM}, *SAID]
    options = {"num_predict": size, "temperature": 0}
    body = {"messages": messages, "options": options, "stream": False}
    text: str = ask.post("/api/chat", json=body).json()["message"]["content"]
    return text


@pytest.mark.parametrize("dialect", [claude, responses, llama])
@pytest.mark.parametrize("size", [12, 40])
def test_the_same_answer(
    client: httpx.Client, dialect: Callable[[httpx.Client, int], str], size: int
) -> None:
    assert dialect(client, size) == chat(client, size) != ""


VALUE = "Käse \u2713"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"const": VALUE}},
    "required": ["name"],
    "additionalProperties": False,
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": SAID, "max_tokens": 60, "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    },
    "/v1/messages": {
        "messages": SAID, "max_tokens": 60, "temperature": 0,
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    },
    "/v1/responses": {
        "input": SAID, "max_output_tokens": 60, "temperature": 0,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    },
    "/api/chat": {
        "messages": SAID, "stream": False, "format": SCHEMA,
        "options": {"num_predict": 60, "temperature": 0},
    },
    "/api/generate": {
        "prompt": "x", "stream": False, "format": SCHEMA,
        "options": {"num_predict": 60, "temperature": 0},
    },
}  # fmt: skip
TEXTS: dict[str, Callable[[Any], str]] = {
    "/v1/chat/completions": lambda made: made["choices"][0]["message"]["content"],
    "/v1/messages": lambda made: made["content"][0]["text"],
    "/v1/responses": lambda made: made["output"][0]["content"][0]["text"],
    "/api/chat": lambda made: made["message"]["content"],
    "/api/generate": lambda made: made["response"],
}


@pytest.mark.parametrize("path", BODIES)
def test_a_schema_is_obeyed(client: httpx.Client, path: str) -> None:
    answer = client.post(path, json=BODIES[path])
    assert answer.status_code == 200, answer.text
    assert json.loads(TEXTS[path](answer.json())) == {"name": VALUE}


@pytest.mark.parametrize("path", BODIES)
def test_a_schema_that_is_none_is_refused(client: httpx.Client, path: str) -> None:
    text = json.dumps(BODIES[path]).replace('"type": "object"', '"type": "hiccup"')
    answer = client.post(path, content=text, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert said(answer)


PATHS = ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat", "/api/generate"]


def said(answer: httpx.Response) -> str:
    """The words of an error, in any dialect."""
    error: Any = answer.json()["error"]
    return error if isinstance(error, str) else str(error["message"])


@pytest.mark.parametrize("path", [*PATHS, "/v1/messages/count_tokens", "/api/show", "/api/pull"])
def test_what_is_no_body(client: httpx.Client, path: str) -> None:
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b"null", b'{"model": NaN}', b"\xff", b'{"a":1,"a":2}'):
        answer = client.post(path, content=content, headers=json_type)
        assert answer.status_code == 400, content
        assert said(answer)
    assert (
        client.post(path, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    )
    assert client.get(path).status_code == 405


@pytest.mark.parametrize(
    "value", [None, 5, "x", [], [5], [[]], {}, {"a": 1}, True, 1e308, "\x00", [{"role": "user"}]]
)
@pytest.mark.parametrize("path", PATHS)
def test_hostile_values_are_refused_in_words(
    client: httpx.Client, path: str, value: object
) -> None:
    """Whatever a field holds, the answer is one of the dialect's, and never our own failure."""
    limit = {
        "/api/chat": {"options": {"num_predict": 1}},
        "/api/generate": {"options": {"num_predict": 1}},
    }
    small = limit.get(
        path, {"max_tokens": 1} if path != "/v1/responses" else {"max_output_tokens": 1}
    )
    own = {"messages": SAID} if "chat" in path or "messages" in path else {}
    own |= {"input": "x"} if path == "/v1/responses" else {}
    own |= {"prompt": "x", "stream": False} if path == "/api/generate" else {}
    limits = ("options", "max_tokens") if value is None or value == {} else ()
    for field in (name for name in FIELDS if name not in limits):
        body = {**small, **own, field: value}
        answer = client.post(
            path, content=json.dumps(body), headers={"content-type": "application/json"}
        )
        assert answer.status_code in (200, 400, 404), (field, answer.text)
        if answer.status_code != 200:
            assert said(answer)


FIELDS = [
    "messages", "input", "prompt", "system", "instructions", "tools", "tool_choice", "thinking", "think",
    "output_config", "format", "text", "reasoning", "options", "stop_sequences", "model", "keep_alive",
    "context", "include", "metadata", "temperature", "max_tokens", "stream",
]  # fmt: skip


def test_the_description_keeps_bodies_of_one_name_apart(client: httpx.Client) -> None:
    """Several dialects call a part of a body a message, or a tool."""
    told = client.get("/openapi.json").json()

    def fields(path: str) -> set[str]:
        content = told["paths"][path]["post"]["requestBody"]["content"]
        name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        return set(told["components"]["schemas"][name]["properties"])

    assert "input" in fields("/v1/responses") - fields("/v1/messages")
    assert "stop_sequences" in fields("/v1/messages") - fields("/v1/responses")
    assert fields("/v1/messages") > fields("/v1/messages/count_tokens")
    references = re.findall(r'"\$ref": ?"#/components/schemas/([^"]+)"', json.dumps(told))
    assert set(references) <= set(told["components"]["schemas"])


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/messages", "messages"),
        ("/v1/messages", "system"),
        ("/v1/messages", "tools"),
        ("/v1/messages", "stop_sequences"),
        ("/v1/responses", "input"),
        ("/v1/responses", "tools"),
        ("/api/chat", "messages"),
        ("/api/chat", "tools"),
        ("/api/generate", "context"),
    ],
)
@pytest.mark.parametrize("item", ["{}", "[]", '{"role":"user"}', '{"type":"text"}'])
def test_too_many_of_anything_is_refused_at_once(
    client: httpx.Client, path: str, field: str, item: str
) -> None:
    text = f'{{"max_tokens": 1, "{field}": [{",".join([item] * 200_000)}]}}'
    answer = client.post(path, content=text, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert len(answer.content) < 2000
    assert said(answer)


def test_an_error_passes_through_a_context() -> None:
    """Leaving one gives an exception its traceback anew, which a frozen class would not let it."""

    @contextmanager
    def context() -> Iterator[None]:
        yield

    with pytest.raises(ApiError, match="no"), context():
        raise ApiError(status=400, message="no")
