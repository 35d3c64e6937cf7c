"""Who hangs up is computed for no longer, whether it streams or not. Replies here do not end by themselves.
https://github.com/ROCm/ATOM/pull/1441, https://github.com/cubist38/mlx-openai-server/issues/269,
https://github.com/vllm-project/vllm/issues/54947"""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from outsize.engine.batch import Batch
from outsize.engine.model import Model
from outsize.engine.request import Request
from outsize.errors import ReadError
from tests.serve.ask import CHAT, TEXT, asked, chat, text
from tests.serve.conftest import ENDLESS, Running, Serving

LONG = {"max_tokens": ENDLESS, "ignore_eos": True, "temperature": 1, "seed": 1}


@pytest.fixture
def running(serve: Serving, endless: Callable[[], Model]) -> Running:
    return serve(endless).until_ready()


def sent(running: Running, path: str, body: dict[str, Any]) -> socket.socket:
    """A request on its way."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    sock = socket.create_connection(running.address, timeout=30)
    sock.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return sock


def busy(running: Running, count: int) -> None:
    running.until(lambda: running.load().running == count, f"{count} replies are computed")


def idle(running: Running) -> None:
    def is_so() -> bool:
        load = running.load()
        return load.running == load.waiting == 0

    running.until(is_so, "nothing is computed any more")


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_one_that_hangs_up(running: Running, path: str, stream: bool, n: int) -> None:
    body = (chat if path == CHAT else text)(stream=stream, n=n, **LONG)
    sock = sent(running, path, body)
    busy(running, n)
    if stream:
        seen = b""
        while seen.count(b"data: ") < 3 * n:
            seen += sock.recv(1 << 16)
    sock.close()
    idle(running)
    running.until(lambda: running.host.counts.requests["openai", 499] == 1, "it is counted so")


def test_one_that_hangs_up_while_it_waits(running: Running) -> None:
    socks = [sent(running, CHAT, chat(stream=True, **LONG)) for _ in range(6)]
    running.until(lambda: running.load().waiting == 2, "four are computed, two wait")
    for sock in reversed(socks):
        sock.close()
    idle(running)


def test_one_that_hangs_up_before_the_first_token(running: Running) -> None:
    for stream in (True, False):
        sock = sent(running, TEXT, text("x" * 10_000, stream=stream, **LONG))
        busy(running, 1)
        sock.close()
        idle(running)


def test_many_that_hang_up(running: Running) -> None:
    """At any moment, and then one is answered as ever."""
    with running.client() as client:
        before = asked(client, CHAT, chat())["choices"]
        random_ = random.Random(1)
        for _ in range(40):
            body = chat(stream=random_.random() < 0.5, **LONG)
            sock = sent(running, CHAT, body)
            if random_.random() < 0.7:
                sock.settimeout(0.02 * random_.random())
                with suppress(TimeoutError):
                    sock.recv(100)
            sock.close()
        idle(running)
        assert asked(client, CHAT, chat())["choices"] == before


def lines_of(reply: httpx.Response) -> Iterator[str]:
    return (line for line in reply.iter_lines() if line)


def test_signs_of_life(serve: Serving, endless: Callable[[], Model]) -> None:
    """While a long prompt is read, a stream says that it lives, after its headers and the role."""
    running = serve(endless, silence_s=0.01).until_ready()
    body = chat("x" * 6000, stream=True, max_tokens=3)
    with running.client() as client, client.stream("POST", CHAT, json=body) as reply:
        lines = list(lines_of(reply))
    assert "role" in lines[0]
    assert lines[1].startswith(":")
    assert lines[-1] == "data: [DONE]"


def test_a_reply_that_breaks_off(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the headers have left, an error is an event, and ends the stream; the next is answered."""
    fails = threading.Event()
    step = Batch.step

    def failing(self: Batch) -> list[Request]:
        if fails.is_set():
            fails.clear()
            raise ReadError("the disk is gone")
        return step(self)

    monkeypatch.setattr(Batch, "step", failing)
    with running.client() as client:
        with client.stream("POST", CHAT, json=chat(stream=True, **LONG)) as reply:
            lines = lines_of(reply)
            for _ in range(3):
                next(lines)
            fails.set()
            last = list(lines)
        assert last[-1] == "data: [DONE]"
        error = json.loads(last[-2].removeprefix("data: "))["error"]
        assert (error["message"], error["type"]) == ("the disk is gone", "server_error")
        assert not any('"finish_reason":"' in line for line in last)
        asked(client, CHAT, chat())
        fails.set()
        refused = client.post(CHAT, json=chat())
        assert refused.status_code == 500
        assert refused.headers["x-should-retry"] == "false"


def test_the_end_with_grace(serve: Serving, endless: Callable[[], Model]) -> None:
    """What has begun may end; what comes now is refused; what does not end in time is broken off."""
    running = serve(endless, grace=0.3).until_ready()
    with running.client() as client:
        with client.stream("POST", CHAT, json=chat(stream=True, **LONG)) as reply:
            lines = lines_of(reply)
            for _ in range(3):
                next(lines)
            running.call(running.server.end)
            running.until(lambda: running.host.state == "ending", "it has begun to end")
            refused = client.post(CHAT, json=chat())
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert client.get("/health").status_code == 503
            last = list(lines)
        assert "the server ended" in last[-2]
        assert last[-1] == "data: [DONE]"
    running.join()
    with pytest.raises(httpx.ConnectError), running.client() as client:
        client.get("/health")


def test_the_end_lets_a_reply_end(serve: Serving, endless: Callable[[], Model]) -> None:
    running = serve(endless, grace=30.0).until_ready()
    with running.client() as client:
        body = chat(stream=True, **{**LONG, "max_tokens": 200})
        with client.stream("POST", CHAT, json=body) as reply:
            lines = lines_of(reply)
            next(lines)
            running.call(running.server.end)
            last = list(lines)
    assert '"finish_reason":"length"' in last[-2]
    assert last[-1] == "data: [DONE]"
    running.join()


def test_the_end_twice_is_at_once(serve: Serving, endless: Callable[[], Model]) -> None:
    running = serve(endless, grace=1000.0).until_ready()
    sock = sent(running, CHAT, chat(stream=True, **LONG))
    busy(running, 1)
    running.call(running.server.end)
    running.end()
    while sock.recv(1 << 16):
        pass
    sock.close()
