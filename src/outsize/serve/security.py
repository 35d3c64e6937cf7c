"""Who may ask: requests for this machine under a name of its own, with the key where there is one.

A web page in a browser can send requests to servers on the same machine, and by DNS rebinding read what they
answer. So a Host header that names another machine is refused, bodies must be declared JSON (which a page
cannot send across origins unasked), and no origin is allowed unless `--cors` says so.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from outsize.serve.errors import ApiError
from outsize.serve.http import call_of, refusal
from outsize.serve.options import ServeOptions, is_loopback

# What needs no key: whether the server is there, its models' names, and the page, which asks for the key.
OPEN_PATHS = frozenset({"/", "/health", "/v1/models", "/models", "/favicon.ico"})
OPEN_FOLDER = "/page/"
VERSIONS = ("1.0", "1.1")  # of HTTP


class Guard:
    """ASGI middleware: refuses foreign hosts and wrong keys."""

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app, self._options = app, options
        self._names = own_names(options.host)
        self._key = None if options.api_key is None else _digest(options.api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = self._refused(scope["path"], Headers(scope=scope))
        if scope["http_version"] not in VERSIONS:
            error = ApiError(
                status=400, message="HTTP/1.1 or HTTP/1.0 is spoken here; ask in one of them"
            )
        if error is None:
            await self._app(scope, receive, send)
            return
        response = refusal(call_of(scope, receive), error)
        await response(scope, receive, send)

    def _refused(self, path: str, headers: Headers) -> ApiError | None:
        has_key = self._key is not None and any(
            hmac.compare_digest(_digest(key), self._key) for key in keys(headers)
        )
        host = host_of(headers.get("host", ""))
        if not has_key and not self._is_own(host):
            return ApiError(
                status=403,
                message=f"the Host header names {host[:200]!r}, which is not this server; ask for "
                f"{self._options.host}, or for localhost",
                code="foreign_host",
            )
        if self._key is None or has_key or is_open(path):
            return None
        what = "is wrong" if keys(headers) else "is missing"
        return ApiError(
            status=401,
            message=f"the API key {what}; send it as `Authorization: Bearer KEY`, or as `X-Api-Key: KEY`",
            code="invalid_api_key",
        )

    def _is_own(self, host: str) -> bool:
        """Names of this machine; of another address than loopback also any address, which no page can make
        a browser take for a name."""
        if is_loopback(host) or host in self._names:
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return not is_loopback(self._options.host)


def is_open(path: str) -> bool:
    """May a path be asked for without the key?"""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def keys(headers: Mapping[str, str]) -> list[str]:
    """The keys that a request gives."""
    kind, _, bearer = headers.get("authorization", "").partition(" ")
    given = [bearer.strip()] if kind.lower() == "bearer" else []
    return [key for key in (*given, headers.get("x-api-key", "")) if key]


def host_of(header: str) -> str:
    """A Host header's name, without the port and the brackets of an IPv6 address."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def own_names(host: str) -> frozenset[str]:
    """Names that mean this machine, where it listens on `host`."""
    if is_loopback(host):
        return frozenset({host.lower()})
    name = socket.gethostname().lower()
    return frozenset({host.lower(), name, f"{name}.local", name.partition(".")[0]})


def _digest(key: str) -> bytes:
    """Of equal length, so that comparing takes as long for any key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
