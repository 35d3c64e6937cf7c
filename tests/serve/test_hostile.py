"""Requests that are malformed, or too large, or never end: each is answered by a 4xx in words, at once."""

from __future__ import annotations

import gzip
import json
import socket
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from outsize.serve import http, schema, server
from outsize.serve.errors import ApiError
from outsize.serve.openai_schema import ChatBody
from tests.serve.ask import CHAT, TEXT, asked, chat
from tests.serve.conftest import Running

HEADERS = {"content-type": "application/json"}
GOOD = json.dumps(chat())[1:-1]


def with_schema(schema: Any) -> str:
    """A body that asks for an answer that obeys a schema."""
    given = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return json.dumps(chat(response_format=given))


BODIES: dict[str, bytes | str] = {
    "empty": "", "no JSON": "hello", "half": '{"messages": [', "a list": "[]", "a number": "1",
    "null": "null",
    "deep lists": "[" * 50_000, "deep lists, closed": "[" * 50_000 + "]" * 50_000,
    "deep objects": '{"a":' * 50_000, "deep in a field": '{"metadata":' + '{"a":' * 200 + "1" + "}" * 201,
    "half a pair": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "half a pair as a key": '{"\\udc00": 1}',
    "many digits": '{"max_tokens": ' + "9" * 5000 + "}", "large": '{"temperature": 1' + "0" * 400 + "}",
    "NaN": f'{{"temperature": NaN, {GOOD}}}', "Infinity": '{"temperature": -Infinity}',
    "a float out of range": '{"temperature": 1e999}',
    "twice": '{"model": "a", "model": "b"}',
    "twice within": '{"messages": [{"role": "user", "role": "user"}]}',
    "not UTF-8": b'{"model": "\xff\xfe"}', "UTF-16": '{"model": "a"}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}", "a NUL": '{"model": "a\\u0000"}', "comment": "{/* */}",
    "CRLF in the name": json.dumps(chat(model="a\r\nset-cookie: b")),
    "a long stop": json.dumps(chat(stop="x" * (1 << 20))),
    "many stops": json.dumps(chat(stop=["x"] * 100_000)),
    "many messages": json.dumps({"messages": [{}] * 1_000_000}),
    "many bad messages": json.dumps({"messages": [1] * 1_000_000}),
    "many keys": json.dumps({f"k{i}": i for i in range(100_000)}),
    "a long key": json.dumps({"k" * 1_000_000: 1}),
    "many biases": json.dumps(chat(logit_bias={str(i): 1 for i in range(100_000)})),
    "a schema that is none": with_schema([]), "a schema of no type": with_schema({"type": "hiccup"}),
    "a reference out": with_schema({"$ref": "http://evil.example/schema.json"}),
    "a reference to nowhere": with_schema({"$ref": "#/$defs/none"}),
    "a reference to itself": with_schema({"$ref": "#"}),
    "a deep schema": with_schema(json.loads('{"not":' * 90 + "{}" + "}" * 90)),
    "a large schema": with_schema({"enum": [f"a{i}" for i in range(300_000)]}),
    "too long a prompt": json.dumps(chat("x" * 1_000_000)),
    "a template's own variable": json.dumps(chat(chat_template_kwargs={"messages": []})),
    "a token below": json.dumps({"prompt": [-1]}),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body(client: httpx.Client, name: str) -> None:
    body = BODIES[name]
    raw = body if isinstance(body, bytes) else body.encode()
    path = TEXT if name == "a token below" else CHAT
    reply = client.post(path, content=raw, headers=HEADERS)
    assert 400 <= reply.status_code < 500, reply.text
    error = reply.json()["error"]
    assert error["message"]
    assert len(reply.content) < 4000
    assert reply.headers["x-request-id"].startswith("req_")
    assert reply.headers["x-should-retry"] == "false"
    assert "set-cookie" not in reply.headers


def test_a_pair_that_is_whole(client: httpx.Client) -> None:
    raw = json.dumps(chat("\U0001f600"))
    assert "\\ud83d" in raw
    assert client.post(CHAT, content=raw, headers=HEADERS).status_code == 200


def test_too_large_a_body(client: httpx.Client) -> None:
    reply = client.post(CHAT, content=b"x" * ((8 << 20) + 1), headers=HEADERS)
    assert reply.status_code == 413
    reply = client.post(CHAT, content=(b"x" * (1 << 20) for _ in range(9)), headers=HEADERS)
    assert reply.status_code == 413
    asked(client, CHAT, chat())


def test_many_large_bodies(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they have a limit, too, and what was answered no longer counts."""
    monkeypatch.setattr(http, "MAX_BODIES", 1000)
    counts = served.host.counts
    with socket.create_connection(served.address, timeout=30) as sock, served.client() as client:
        sock.sendall(HEAD + b"content-length: 990\r\n\r\n" + b" " * 989)
        served.until(lambda: counts.body_bytes == 989, "it has come")
        reply = client.post(CHAT, json=chat())
        assert reply.status_code == 503
        assert "retry-after" in reply.headers
    served.until(lambda: counts.body_bytes == 0, "nothing is left")
    with served.client() as client:
        asked(client, CHAT, chat())
    served.until(lambda: counts.body_bytes == 0, "nothing is counted of what was answered")


@pytest.mark.parametrize("coding", ["gzip", "zstd", "br", "deflate", "gzip, gzip"])
def test_a_compressed_body(client: httpx.Client, coding: str) -> None:
    bomb = gzip.compress(b"{" * (10 << 20))
    reply = client.post(CHAT, content=bomb, headers={**HEADERS, "content-encoding": coding})
    assert reply.status_code == 415
    assert "compressed" in reply.json()["error"]["message"]


def raw(running: Running, request: bytes, ends: bool = False) -> bytes:
    """What is answered to bytes."""
    with socket.create_connection(running.address, timeout=30) as sock:
        sock.sendall(request)
        if ends:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        while more := sock.recv(1 << 16):
            answer += more
    return answer


HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
)


@pytest.mark.parametrize(
    "request_",
    [b"hello\r\n\r\n", b"GET / HTTP/x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
     b"GET / HTTP/1.1\r\nhost: localhost\r\na: " + b"b" * (100 << 10), b"GET / HTTP/1.1\r\n\r\n",
     HEAD + b"content-length: -5\r\n\r\n", HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
     HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", HEAD + b"transfer-encoding: gzip\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_request(served: Running, request_: bytes) -> None:
    answer = raw(served, request_)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] in (b"400", b"501"), answer
    assert json.loads(body)["error"]["message"]
    assert b"x-request-id: req_" in head


def test_a_body_of_chunks_without_end(served: Running) -> None:
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    answer = b""
    with socket.create_connection(served.address, timeout=30) as sock:
        sock.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(20):
            try:
                sock.sendall(chunk)
            except OSError:
                break
        try:
            answer = sock.recv(1 << 16)
        except OSError:  # reset, with what was still unread
            return
    assert b" 413 " in answer.split(b"\r\n")[0]


def test_what_was_refused_is_not_read_for_ever(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LINGER_S", 0.05)
    with socket.create_connection(served.address, timeout=30) as sock:
        sock.sendall(HEAD + b"content-length: 9000000\r\n\r\n{")
        answer = b""
        while more := sock.recv(1 << 16):
            answer += more
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert answer.endswith(b"}")


def test_a_body_that_does_not_come(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_S", 0.05)
    with socket.create_connection(served.address, timeout=30) as sock:
        sock.sendall(HEAD + b"content-length: 100\r\n\r\n{")
        assert b" 408 " in sock.recv(1 << 16).split(b"\r\n")[0]


def test_headers_that_do_not_come(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADER_S", 0.05)
    assert raw(served, b"GET /health HTTP/1.1\r\nhost: loc") == b""
    assert raw(served, b"") == b""


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/none", 404), ("GET", "/v1", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405),
     ("PUT", CHAT, 405), ("GET", "/v1/models/none", 404), ("GET", "/v1/models/%0d%0aa:%20b", 404),
     ("GET", "/../../etc/passwd", 404), ("GET", "/page/../../../etc/passwd", 404), ("POST", "/health", 405)],
)  # fmt: skip
def test_no_such_route(client: httpx.Client, method: str, path: str, status: int) -> None:
    reply = client.request(method, path)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert reply.headers["x-should-retry"] == "false"
    assert ("allow" in reply.headers) is (status == 405)


@pytest.mark.parametrize("path", ["/v1/messages/none", "/api/none", "/v1/none"])
def test_each_dialect_has_its_shape(client: httpx.Client, path: str) -> None:
    reply: Any = client.get(path)
    told = reply.json()
    if path.startswith("/api"):
        assert isinstance(told["error"], str)
    elif "messages" in path:
        assert told["type"] == "error"
        assert told["error"]["type"] == "not_found_error"
        assert told["request_id"] == reply.headers["x-request-id"]
    else:
        assert told["error"]["code"] == "not_found"


def test_a_model_that_is_not_there(client: httpx.Client) -> None:
    reply = client.post(CHAT, json=chat(model="none"))
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    assert "other" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/models", "/embeddings"])
def test_short_paths(client: httpx.Client, path: str) -> None:
    whole, short = (client.post(p, json={}) for p in (f"/v1{path}", path))
    assert (whole.status_code, whole.json()) == (short.status_code, short.json())


@pytest.mark.parametrize(
    "body",
    [
        {**chat(), "logit_bias": {str(i): "a" for i in range(50_000)}},
        {**chat(), "modalities": [0] * 50_000},
        {**chat(), "stop": [0] * 50_000},
        {"messages": [{"role": "user", "content": [0] * 50_000}]},
        {"messages": [{"role": "user", "tool_calls": [{}] * 50_000}]},
    ],
)
def test_one_fault_of_many_is_enough(body: dict[str, Any]) -> None:
    """A note of each would take hundreds of times the body's memory."""
    with pytest.raises(ValidationError) as found:
        ChatBody.model_validate(body)
    assert found.value.error_count() < 10


def test_many_keys_of_which_one_is_twice() -> None:
    """Found in one pass: by counting each it took hours."""
    keys = "".join(f'"k{i}": 0, ' for i in range(100_000))
    with pytest.raises(ApiError, match="'k99999' is given twice"):
        schema.parse(("{" + keys + '"k99999": 1}').encode())


def test_many_objects() -> None:
    with pytest.raises(ApiError, match="more than 100,000 objects"):
        schema.parse(b'{"messages": [' + b"{}," * 100_000 + b"{}]}")
