"""The client of the load test, against servers of a few lines that say exactly what they are told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
from collections.abc import Sequence

import pytest

from outsize.bench.serve.bodies import BODIES, body_of
from outsize.bench.serve.client import Address, Exchange, send
from outsize.bench.serve.summary import percentiles, summed, within
from outsize.errors import OptionError

OK = b"HTTP/1.1 200 OK\r\n"
STREAM = OK + b"Content-Type: text/event-stream\r\n"
USED = {"prompt_tokens": 4, "completion_tokens": 1}
JSON = OK + b"content-type: application/json\r\n"


def event(**data: object) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def choice(text: str) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}}])


def answered(pieces: Sequence[bytes], waits: bool = False, **how: float) -> Exchange:
    """What the client makes of a server that sends these pieces, one at a time, and hangs up (or waits until
    the client does)."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(2)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.002)  # so that each comes by itself
            await (reader.read() if waits else asyncio.sleep(0))
        writer.close()
        served.set()

    served = asyncio.Event()

    async def run() -> Exchange:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
            found = await send(address, address.request("/x", {}), how.pop("limit_s", 20.0), **how)
            await served.wait()
        return found

    return asyncio.run(run())


def chunks(data: bytes, size: int) -> list[bytes]:
    return [
        b"%x\r\n%s\r\n" % (len(p), p)
        for p in (data[i : i + size] for i in range(0, len(data), size))
    ]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_in_any_pieces(size: int) -> None:
    told = (
        event(choices=[{"delta": {"role": "assistant", "content": None}}]) + b": a comment\n\n" + choice("Hé")
        + choice("llo") + event(choices=[{"delta": {}, "finish_reason": "length"}])
        + event(choices=[], usage=USED | {"prompt_tokens_details": {"cached_tokens": 3}})
        + b"data: [DONE]\n\n"
    )  # fmt: skip
    head = STREAM + b"Transfer-Encoding: chunked\r\n\r\n"
    found = answered([head, *chunks(told, size), b"0\r\n\r\n"])
    assert (found.text, found.finish, found.error, found.ended) == ("Héllo", "length", "", True)
    assert (found.prompt_tokens, found.cached_tokens, found.new_tokens) == (4, 3, 1)
    assert len(found.events) == 2
    assert 0 <= found.head_s <= found.first_s <= found.seconds
    assert [
        round(b - a - gap, 9)
        for a, b, gap in zip(found.events, found.events[1:], found.gaps, strict=False)
    ] == [0]


@pytest.mark.parametrize(
    ("pieces", "error", "status"),
    [
        ([], "closed without an answer", 0),
        ([b"SSH-2.0\r\n"], "malformed answer", 0),
        ([b"SMTP hello there\r\n\r\n"], "malformed answer", 0),
        ([STREAM + b"\r\n", choice("a")], "cut", 200),
        ([STREAM + b"Transfer-Encoding: chunked\r\n\r\n", *chunks(choice("a"), 9)], "cut", 200),
        ([STREAM + b"\r\n", event(error={"type": "x"}), b"data: [DONE]\n"], "in the stream: x", 200),
        ([STREAM + b"\r\n", b"data: {\n"], "malformed answer", 200),
        ([JSON + b"Content-Length: 9\r\n\r\n{}"], "cut", 200),
        ([JSON + b"Content-Length: 2\r\n\r\nxx"], "malformed answer", 200),
        ([b"HTTP/1.1 429 Too Many\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n"], "HTTP 429", 429),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", JSON + b"Content-Length: 2\r\n\r\n{}"], "", 200),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_told(pieces: list[bytes], error: str, status: int) -> None:
    found = answered(pieces)
    assert (found.error, found.status) == (error, status)


def test_time_is_bounded_and_one_may_leave() -> None:
    for how, error in (({"limit_s": 0.05}, "timeout"), ({"leave_s": 0.05}, "left")):
        found = answered([STREAM + b"\r\n", choice("a")], True, **how)
        assert (found.error, found.text) == (error, "a")
        assert 0.05 <= found.seconds < 5


def test_nobody_there() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = Address("127.0.0.1", s.getsockname()[1])
    assert asyncio.run(send(address, b"", 5)).error == "refused"


USAGE = {"input_tokens": 4, "output_tokens": 1}
REPLIES: dict[str, tuple[object, list[object]]] = {
    "/v1/chat/completions": (
        {"choices": [{"message": {"content": "hi"}}], "usage": USED},
        [{"choices": [{"delta": {"content": "h"}}]}, {"choices": [{"delta": {"reasoning_content": "i"}}]},
         {"choices": [], "usage": USED}],
    ),
    "/v1/completions": (
        {"choices": [{"text": "hi"}], "usage": USED},
        [{"choices": [{"text": "h"}]}, {"choices": [{"text": "i"}], "usage": USED}],
    ),
    "/v1/responses": (
        {"object": "response", "output": [{"content": [{"text": "hi"}]}], "usage": USAGE, "error": None},
        [{"type": "response.output_text.delta", "delta": "hi"},
         {"type": "response.completed",
          "response": {"usage": USAGE, "error": None, "output": [{"content": [{"text": "hi"}]}]}}],
    ),
    "/v1/messages": (
        {"type": "message", "content": [{"type": "text", "text": "hi"}], "usage": USAGE},
        [{"type": "message_start", "message": {"content": [], "usage": {"input_tokens": 4}}},
         {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "hi"}},
         {"type": "message_delta", "usage": {"output_tokens": 1}}, {"type": "message_stop"}],
    ),
    "/api/chat": (
        {"message": {"content": "hi"}, "done": True, "prompt_eval_count": 4, "eval_count": 1},
        [{"message": {"content": "hi"}, "done": False},
         {"message": {"content": ""}, "done": True, "prompt_eval_count": 4, "eval_count": 1}],
    ),
    "/api/generate": (
        {"response": "hi", "done": True, "prompt_eval_count": 4, "eval_count": 1},
        [{"response": "hi", "done": False},
         {"response": "", "done": True, "prompt_eval_count": 4, "eval_count": 1}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", list(BODIES))
def test_every_dialect_says_the_same(path: str) -> None:
    whole, stream = REPLIES[path]
    once, pieces = Exchange(), Exchange()
    once.note(whole, 1.0)
    for n, data in enumerate(stream):
        pieces.note(data, float(n))
    for found in (once, pieces):
        assert (found.text, found.prompt_tokens, found.new_tokens, found.error) == ("hi", 4, 1, "")
    assert pieces.ended == (path not in ("/v1/chat/completions", "/v1/completions")), (
        "those end with [DONE]"
    )
    common = {"model": "m", "max_tokens": 7, "temperature": 0.5, "stream": True, "seed": 3}
    text = json.dumps(body_of(path, "hello", common))
    assert "hello" in text
    assert "7" in text
    assert "0.5" in text


@pytest.mark.parametrize(
    "data", [None, 1, "x", [], {"choices": 1}, {"choices": [1]}, {"choices": [{"delta": 5, "message": [2]}]},
             {"usage": 3}, {"type": "content_block_delta"}, {"message": {"content": [1]}, "done": 0}],
)  # fmt: skip
def test_events_of_another_shape_say_nothing(data: object) -> None:
    found = Exchange()
    found.note(data, 1.0)
    assert (found.text, found.events, found.error, found.ended) == ("", [], "", False)


def test_addresses() -> None:
    found = Address.parse("http://localhost:81/a/v1/", "k")
    assert (found.host, found.port, found.prefix) == ("localhost", 81, "/a")
    assert b"POST /a/x HTTP/1.1\r\n" in found.request("/x", {})
    assert b"Authorization: Bearer k\r\n" in found.request("/x", {})
    for url in ("https://a", "localhost", "http://a:b", "http://[", ""):
        with pytest.raises(OptionError, match="one like http://"):
            Address.parse(url)


def of_times(began: float, *events: float, **more: object) -> Exchange:
    return Exchange(began=began, events=list(events), seconds=events[-1] if events else 1.0, **more)  # type: ignore[arg-type]


def test_sums() -> None:
    assert percentiles([math.nan]) is None
    assert percentiles(range(1, 101)) == {"p50": 50, "p95": 95, "p99": 99, "most": 100}
    assert percentiles([3.0]) == {"p50": 3, "p95": 3, "p99": 3, "most": 3}
    out = [of_times(0, 1, 2, 4, new_tokens=6), of_times(1, 1, 2), of_times(2, error="cut")]
    row = summed(out)
    assert (row["requests"], row["errors"], row["new_tokens"]) == (3, {"cut": 1}, 8)
    assert (row["seconds"], row["tokens_per_s"]) == (4, 2)
    assert row["gap_s"] == {"p50": 1, "p95": 2, "p99": 2, "most": 2}
    part = within(out, 2, 4)  # of the first one event (two tokens), of the second one
    assert (part["seconds"], part["tokens_per_s"]) == (2, 1.5)
    assert part["gap_s"] == {"p50": 1, "p95": 2, "p99": 2, "most": 2}
    assert within([], 0, 0)["tokens_per_s"] is None
