"""Who may ask: keys, hosts, origins. https://github.com/gptme/gptme/pull/3324 and others show what happens
where a web page may read a local server."""

from __future__ import annotations

import socket

import httpx
import pytest
from starlette.routing import Route

from outsize.errors import OptionError
from outsize.serve.app import routes
from outsize.serve.options import ServeOptions
from outsize.serve.security import host_of, is_open, own_names
from tests.serve.ask import CHAT, chat, refused
from tests.serve.conftest import Running, Serving

KEY = "sk-this-is-the-key"


def paths(running: Running) -> list[tuple[str, str]]:
    """Every route's method and path."""
    return [
        (method, route.path.replace("{name:path}", "other"))
        for route in routes(running.host)
        if isinstance(route, Route)
        for method in route.methods or ()
    ]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example",
             "10.0.0.1", "[::2]", "0.0.0.0", "", "localhost@evil.example", "2130706433"],
)  # fmt: skip
def test_a_foreign_host_is_refused_on_every_route(
    client: httpx.Client, served: Running, host: str
) -> None:
    for method, path in [*paths(served), ("GET", "/"), ("GET", "/none"), ("DELETE", "/v1/models")]:
        reply = client.request(method, path, headers={"host": host})
        assert reply.status_code == 403, (method, path)
        assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "127.0.0.1", "127.0.0.9:1", "[::1]:8080"]
)
def test_this_machines_names(client: httpx.Client, host: str) -> None:
    assert client.get("/health", headers={"host": host}).status_code == 200


def test_hosts() -> None:
    assert host_of("[::1]:80") == "::1"
    assert host_of("Name.Local.:80") == "name.local"
    assert socket.gethostname().lower() in own_names("0.0.0.0")
    assert "box" in own_names("box")
    assert own_names("127.0.0.1") == {"127.0.0.1"}


def test_another_address_needs_a_key(serve: Serving) -> None:
    with pytest.raises(
        OptionError, match=r"--host 0\.0\.0\.0 lets other machines ask; give a key.*--api-key"
    ):
        ServeOptions(host="0.0.0.0")
    with pytest.raises(OptionError, match="API key is empty"):
        ServeOptions(api_key=" ")
    for host in ("127.0.0.1", "::1", "localhost"):
        ServeOptions(host=host)
    running = serve(host="0.0.0.0", api_key=KEY)
    with running.client() as client:
        assert client.get("/v1/models", headers={"host": "10.0.0.1"}).status_code == 200
        foreign = {"host": "evil.example"}
        assert client.get("/v1/models", headers=foreign).status_code == 403
        known = {**foreign, "authorization": f"Bearer {KEY}"}
        assert client.get("/v1/models", headers=known).status_code == 200


def test_keys(serve: Serving) -> None:
    running = serve(api_key=KEY).until_ready()
    with running.client() as client:
        for good in (
            {"authorization": f"Bearer {KEY}"},
            {"authorization": f"bearer  {KEY}"},
            {"x-api-key": KEY},
        ):
            assert client.post(CHAT, json=chat(), headers=good).status_code == 200
        for bad in ({}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}, {"x-api-key": KEY + "x"},
                    {"authorization": "Bearer"}, {"x-api-key": "ä".encode()}):  # fmt: skip
            reply = client.post(CHAT, json=chat(), headers=bad)
            assert reply.status_code == 401
            assert reply.json()["error"]["type"] == "authentication_error"
            assert KEY not in reply.text
        for method, path in paths(running):
            status = client.request(method, path).status_code
            assert (status != 401) is is_open(path), path
        assert client.get("/v1/models", headers={"x-api-key": "bad"}).status_code == 200


def test_no_origin_is_allowed(client: httpx.Client) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        reply = client.post(CHAT, json=chat(), headers={"origin": origin})
        asked_first = {"origin": origin, "access-control-request-method": "POST"}
        before = client.options(CHAT, headers=asked_first)
        for one in (reply, before):
            assert not [name for name in one.headers if name.startswith("access-control")]
        assert before.status_code == 405


def test_an_origin_that_is_allowed(serve: Serving) -> None:
    running = serve(cors=("http://page.example",)).until_ready()
    good, bad = {"origin": "http://page.example"}, {"origin": "http://evil.example"}
    asked_first = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    with running.client() as client:
        reply = client.options(CHAT, headers={**good, **asked_first})
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == good["origin"]
        assert client.options(CHAT, headers={**bad, **asked_first}).status_code == 400
        reply = client.post(CHAT, json=chat(), headers=good)
        assert reply.headers["access-control-allow-origin"] == good["origin"]
        assert (
            "access-control-allow-origin" not in client.post(CHAT, json=chat(), headers=bad).headers
        )


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_what_a_page_may_send_unasked_is_refused(client: httpx.Client, kind: str) -> None:
    reply = client.post(CHAT, content=b"{}", headers={"content-type": kind} if kind else {})
    assert reply.status_code == 415
    assert "application/json" in reply.json()["error"]["message"]


def test_a_charset_is_no_matter(client: httpx.Client) -> None:
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert refused(client, CHAT, {})["param"] == "messages"
    assert client.post(CHAT, content=b"{}", headers=kind).status_code == 400
