"""The page's files, and what its picture is told."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from outsize.engine.model import Model
from outsize.serve import live
from tests.serve.conftest import Running, Serving

PAGE = Path(live.__file__).parent / "page"
ASKED = {"messages": [{"role": "user", "content": "a b c"}], "max_tokens": 4, "ignore_eos": True}


@contextmanager
def frames(client: httpx.Client) -> Iterator[Iterator[dict[str, Any]]]:
    with client.stream("GET", "/v1/live") as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        yield (json.loads(line[6:]) for line in lines)


def test_the_page_is_served_under_a_strict_policy(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    for rule in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"):
        assert rule in policy
    assert "unsafe" not in policy
    assert "set-cookie" not in page.headers
    for kind, name in re.findall(r'(src|href)="(page/[^"]+)"', page.text):
        found = client.get(f"/{name}")
        assert found.status_code == 200, (kind, name)
        assert found.headers["content-security-policy"] == policy
        assert found.headers["x-content-type-options"] == "nosniff"


def test_all_files_of_the_page_are_served(client: httpx.Client) -> None:
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for path in (p for p in PAGE.rglob("*") if p.suffix in kinds):
        found = client.get(f"/page/{path.relative_to(PAGE).as_posix()}")
        assert found.content == path.read_bytes()
        assert found.headers["content-type"].startswith(kinds[path.suffix]), path


def test_a_browser_is_sent_to_no_other_place() -> None:
    """Our own files name no address; the vendored ones are libraries without requests."""
    for path in (p for p in PAGE.iterdir() if p.suffix in (".js", ".css", ".html")):
        for address in re.findall(r"\w+://[^\s\"'`]+", path.read_text()):
            assert address == "http://www.w3.org/2000/svg", path.name
    for path in (PAGE / "vendor").glob("*.js"):
        assert not re.search(
            r"\bfetch\(|XMLHttpRequest|WebSocket|innerHTML|eval\(", path.read_text()
        )


def test_the_page_is_short() -> None:
    own = [p for p in PAGE.iterdir() if p.suffix in (".html", ".js", ".css")]
    assert sum(path.read_text().count("\n") for path in own) < 600


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/vendor",
        "/page/smd.LICENSE",
        "/page/..%2flive.py",
        "/page/%2e%2e/live.py",
        "/page/x\0",
    ],
)
def test_nothing_else_is_served(served: Running, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    with socket.create_connection(served.address) as connection:
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert re.match(rb"HTTP/1.1 40[04] ", answer), answer[:80]


def test_placement_is_the_plan_with_its_parts(client: httpx.Client) -> None:
    told = client.get("/v1/placement").json()
    assert told["planned_bytes"] <= told["budget_bytes"]
    assert {"fixed", "held_bytes", "context", "notes", "kv_bytes_a_token"} <= told.keys()
    assert [part["part"] for part in told["parts"]][:3] == [
        "embedding",
        "attention",
        "feed-forward",
    ]
    assert {part["tier"] for part in told["parts"]} == {"memory"}


def test_frames_tell_what_an_answer_has_read(
    serve: Serving, open_paged: Callable[..., Model]
) -> None:
    running = serve(lambda: open_paged("qwen3_moe")).until_ready()
    with running.client() as client, frames(client) as told:
        first = next(told)
        assert first["state"] == "ready"
        client.post("/v1/chat/completions", json=ASKED).raise_for_status()
        seen = [next(told), next(told)]
        parts = client.get("/v1/placement").json()["parts"]
    service = running.host.running
    assert service is not None
    read = [sum(sizes) for sizes in zip(*(frame["read_bytes"] for frame in seen), strict=True)]
    assert len(read) == len(parts)
    assert sum(read) > 0
    experts = [p["layer"] for p in parts if p["part"] == "experts"]
    assert all(len(frame["experts"]) == len(experts) for frame in seen)
    assert sum(frame["hits"] + frame["misses"] for frame in seen) > 0
    assert all(0.4 < frame["seconds"] < 30 for frame in seen)


def test_frames_end_with_the_server(serve: Serving) -> None:
    running = serve().until_ready()
    with running.client() as client, frames(client) as told:
        assert next(told)["process_bytes"] > 1 << 20
        running.call(running.server.end)
        for frame in told:
            assert frame["state"] in ("ready", "ending")
    running.join()


def test_watching_does_not_wake_a_model(serve: Serving) -> None:
    running = serve(idle_unload=1e-4).until_ready()
    running.until(lambda: running.host.running is None, "closed")
    with running.client() as client, frames(client) as told:
        frame = next(told)
        refused = client.get("/v1/placement")
    assert frame["state"] == "unloaded"
    assert "held" not in frame
    assert refused.status_code == 503
    assert "not open now" in refused.json()["error"]["message"]
    assert running.host.running is None


def test_only_so_many_watch(serve: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_WATCHERS", 1)
    running = serve().until_ready()
    with running.client() as client:
        with frames(client) as told:
            next(told)
            refused = client.get("/v1/live")
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "5"
        running.until(lambda: client.get("/health").is_success, "alive")

        def again() -> bool:
            with client.stream("GET", "/v1/live") as response:
                return response.status_code == 200

        running.until(again, "a place is free again")


def test_the_picture_needs_the_key_and_the_page_does_not(serve: Serving) -> None:
    running = serve(api_key="sesame").until_ready()
    with running.client() as client:
        assert client.get("/").status_code == client.get("/page/chat.js").status_code == 200
        assert client.get("/v1/live").status_code == client.get("/v1/placement").status_code == 401
        key = {"authorization": "Bearer sesame"}
        assert client.get("/v1/placement", headers=key).status_code == 200
