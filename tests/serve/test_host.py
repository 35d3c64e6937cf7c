"""The model behind the server: while it is opened, when it cannot be, when nobody asks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from outsize.engine.model import Model
from outsize.errors import BudgetError, ReadError
from outsize.progress import bars
from outsize.serve import host as hosts
from outsize.serve import server
from outsize.serve.host import FAILED, LOADING, UNLOADED, Host
from outsize.serve.options import ServeOptions
from tests.command import outsize as command
from tests.serve.ask import CHAT, asked, chat
from tests.serve.conftest import Serving

FOREVER_S = 30


def test_it_answers_while_the_model_is_opened(serve: Serving, tiny: Callable[[], Model]) -> None:
    may_open, has_begun = threading.Event(), threading.Event()

    def slowly() -> Model:
        with bars(quiet=True) as progress:
            progress("packing", 2, 5)
        has_begun.set()
        may_open.wait(FOREVER_S)
        return tiny()

    running = serve(slowly)
    has_begun.wait(FOREVER_S)
    with running.client() as client:
        health = client.get("/health")
        assert health.status_code == 503
        assert health.json()["progress"] == 0.4
        assert health.json()["error"]["type"] == "unavailable_error"
        assert "packing, 40 %" in health.json()["error"]["message"]
        reply = client.post(CHAT, json=chat())
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert "x-should-retry" not in reply.headers
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert client.get("/metrics").status_code == 200
        may_open.set()
        running.until_ready()
        assert client.get("/health").json()["status"] == "ok"
        asked(client, CHAT, chat())
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 512


def test_the_end_does_not_wait_for_a_model(serve: Serving, tiny: Callable[[], Model]) -> None:
    """Its opening is broken off where it next tells how far it is."""
    has_begun = threading.Event()
    was_broken_off = threading.Event()

    def slowly() -> Model:
        with bars(quiet=True) as progress:
            has_begun.set()
            while True:
                try:
                    progress("packing", 1, 2)
                except Exception:
                    was_broken_off.set()
                    raise

    running = serve(slowly)
    has_begun.wait(FOREVER_S)
    running.end()
    assert was_broken_off.wait(FOREVER_S)


def test_a_model_that_cannot_be_opened_ends_the_server(
    folder_of: Callable[[str], Path], home: Path
) -> None:
    done = command("serve", str(folder_of("llama")), "--port", "0", "--memory", "1MB", "-q")
    assert done.returncode == BudgetError.exit_status == 2
    assert done.stderr.startswith("error: ")
    assert "1 MB" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no/such/model.gguf"], "no/such/model.gguf"),
        (["--host", "0.0.0.0"], "give a key"),
        (
            ["--host", "no.such.host.invalid", "--api-key", "a"],
            "cannot listen at no.such.host.invalid",
        ),
        (["--port", "70000"], "port is 70000"),
        (["a", "-m", "b"], "two models are given"),
        (["--max-queue", "-1"], "max_queue is -1"),
        (["--grace", "-1"], "grace is -1"),
        (["--idle-unload", "-1"], "idle_unload is -1"),
        (["--streams", "0"], "streams is 0"),
        (["--adapter", "a"], "NAME=PATH"),
    ],
)
def test_flags_that_cannot_be(words: list[str], said: str, home: Path) -> None:
    port = [] if "--port" in words else ["--port", "0"]
    done = command("serve", *words, *port, "-q")
    assert done.returncode == 2
    assert said in done.stderr


def test_a_port_that_is_taken(home: Path) -> None:
    taken = server.bind(ServeOptions(port=0))
    taken.listen()
    port = taken.getsockname()[1]
    done = command("serve", "--port", str(port), "-q")
    taken.close()
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert "--port" in done.stderr


def test_idle_unload(serve: Serving) -> None:
    """Closed after a while; opened by the next request, which is never told 503; /health does not wake it.
    https://github.com/ggml-org/llama.cpp/pull/18228"""
    running = serve(idle_unload=0.05 / 60).until_ready()
    with running.client() as client:
        for _ in range(2):
            running.until(lambda: running.host.state == UNLOADED, "closed")
            health = client.get("/health")
            assert (health.status_code, health.json()["state"]) == (200, "unloaded")
            assert "outsize_ready 0" in client.get("/metrics").text
            assert running.host.running is None
            assert asked(client, CHAT, chat())["choices"][0]["finish_reason"] == "length"


def test_many_wait_for_one_opening(serve: Serving, tiny: Callable[[], Model]) -> None:
    opened = []

    def counted() -> Model:
        opened.append(1)
        return tiny()

    running = serve(counted, idle_unload=0.05 / 60).until_ready()
    running.until(lambda: running.host.state == UNLOADED, "closed")
    before = len(opened)
    replies = list[int]()

    def ask() -> None:
        with running.client() as client:
            replies.append(client.post(CHAT, json=chat()).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [200] * 4
    assert len(opened) == before + 1


def test_a_model_that_cannot_be_opened_again(serve: Serving, tiny: Callable[[], Model]) -> None:
    """Then requests and /health say why, and the next one tries again."""
    fails = threading.Event()

    def sometimes() -> Model:
        if fails.is_set():
            raise ReadError("the disk is gone")
        return tiny()

    running = serve(sometimes, idle_unload=0.05 / 60).until_ready()
    with running.client() as client:
        fails.set()
        running.until(lambda: running.host.state == UNLOADED, "closed")
        reply = client.post(CHAT, json=chat())
        assert reply.status_code == 503
        assert "the disk is gone" in reply.json()["error"]["message"]
        assert "retry-after" in reply.headers
        assert running.host.state == FAILED
        health = client.get("/health")
        assert health.status_code == 503
        assert "the disk is gone" in health.json()["error"]["message"]
        fails.clear()
        asked(client, CHAT, chat())
        assert client.get("/health").status_code == 200


def test_names(serve: Serving) -> None:
    running = serve(alias=("b", "c")).until_ready()
    with running.client() as client:
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == [running.host.name, "b", "c"]
        for name in (*names, None):
            assert asked(client, CHAT, chat(model=name))["model"] == (name or names[0])
        theirs = client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
        assert [model["id"] for model in theirs["data"]] == names
        assert (theirs["first_id"], theirs["last_id"], theirs["has_more"]) == (names[0], "c", False)
        assert {"type", "display_name", "created_at", "id"} <= set(theirs["data"][0])
        reply = client.get("/v1/models/none", headers={"anthropic-version": "2023-06-01"})
        assert reply.json()["type"] == "error"


def test_any_name(serve: Serving) -> None:
    running = serve(alias=("*",)).until_ready()
    with running.client() as client:
        assert asked(client, CHAT, chat(model="gpt-5.4"))["model"] == "gpt-5.4"
        assert client.get("/v1/models/org/any").json()["id"] == "org/any"
        assert len(client.get("/v1/models").json()["data"]) == 1


def test_logs(serve: Serving, capfd: pytest.CaptureFixture[str]) -> None:
    running = serve(json_log=True).until_ready()
    with running.client() as client:
        reply = client.post(CHAT, json=chat())
        client.get("/none%0A%E2%80%A8%1B%5B31m")
        client.get("/health")
    running.end()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["path"] for line in lines] == [CHAT, "/none\n\u2028\x1b[31m"]
    assert lines[0]["id"] == reply.headers["x-request-id"]
    assert (lines[0]["status"], lines[0]["new_tokens"]) == (200, 5)
    assert lines[0]["prompt_tokens"] == reply.json()["usage"]["prompt_tokens"]
    assert (lines[1]["status"], "there is no" in lines[1]["error"]) == (404, True)


def test_a_log_is_a_line_a_request(serve: Serving, capfd: pytest.CaptureFixture[str]) -> None:
    running = serve().until_ready()
    with running.client() as client:
        client.post(CHAT, json=chat())
        client.get("/none%0A%E2%80%A8%1B%5B31m")
        client.post(CHAT, json=chat(model="a\nb"))
    running.end()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"POST {CHAT} 200 ")
    assert lines[0].endswith("+5 tokens")
    assert "\x1b" not in "".join(lines)


def test_adapters_are_models(tiny: Callable[[], Model]) -> None:
    host = Host("tiny", tiny, ServeOptions(alias=("b",)), ("poet",))
    assert host.names() == ["tiny", "b", "poet"]
    assert host.named("poet").adapter == "poet"
    assert host.named("b").adapter is None


def test_what_is_closed_is_closed_before_it_is_opened_again(
    serve: Serving, tiny: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of two would be twice what was planned."""
    done, may_close, close = list[str](), threading.Event(), hosts._close

    def slowly(*given: Any) -> None:
        may_close.wait(FOREVER_S)
        close(*given)
        done.append("closed")

    def noted() -> Model:
        done.append("opens")
        return tiny()

    monkeypatch.setattr(hosts, "_close", slowly)
    running = serve(noted, alias=("other",)).until_ready()
    with running.client() as client, ThreadPoolExecutor(2) as several:
        body = {"model": "other", "prompt": "", "keep_alive": 0}
        unloads = several.submit(client.post, "/api/generate", json=body)
        running.until(lambda: running.host.state == UNLOADED, "it is being closed")
        answers = several.submit(client.post, CHAT, json=chat())
        running.until(lambda: running.host.state == LOADING, "it is asked for")
        may_close.set()
        assert (unloads.result().status_code, answers.result().status_code) == (200, 200)
    assert done == ["opens", "closed", "opens"]
