"""The process around the application: its socket, its connections, and its end."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
from contextlib import ExitStack
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from outsize.errors import OptionError
from outsize.serve import errors
from outsize.serve.app import application
from outsize.serve.host import Host
from outsize.serve.options import ServeOptions

HEADER_BYTES = 64 << 10  # of a request's line and headers
HEADER_S = 30.0  # that they have to arrive in
KEEP_ALIVE_S = 75  # more than pooled clients wait before they use a connection again
CLOSE_S = 5  # that clients have to read what was sent, at the end


def bind(options: ServeOptions) -> socket.socket:
    """The socket to listen at. Raises OptionError."""
    host, port = options.host, options.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with ExitStack() as if_not_bound:
            made = if_not_bound.enter_context(socket.socket(family, kind, protocol))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            if_not_bound.pop_all()
    except OSError as e:
        raise OptionError(
            f"cannot listen at {host}, port {port}: {e.strerror or e}; give another --port (0: any that is "
            "free), or another --host"
        ) from None
    return made


def url(bound: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = bound.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"


class Connection(H11Protocol):
    """One connection: closed if its headers do not come, and a request that is no HTTP is refused in JSON."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(HEADER_S, self._close_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._late.cancel()
        self._late = self.loop.call_later(HEADER_S + KEEP_ALIVE_S, self._close_late)

    def _close_late(self) -> None:
        """No request is on its way, after all that time."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        request_id = f"req_{secrets.token_hex(12)}"
        told = errors.body(errors.invalid(msg), errors.OPENAI, request_id)
        text = json.dumps(told).encode()
        headers = [
            ("content-type", "application/json"), ("content-length", str(len(text))),
            ("connection", "close"), ("x-request-id", request_id), ("x-should-retry", "false"),
        ]  # fmt: skip
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=text), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """Serves a host until it is told to end: then it answers what it has begun, and refuses the rest."""

    def __init__(self, host: Host) -> None:
        super().__init__(
            uvicorn.Config(
                application(host), http=Connection, ws="none", loop="asyncio", lifespan="on",
                log_config=None, log_level=logging.CRITICAL, access_log=False, server_header=False,
                proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_S, h11_max_incomplete_event_size=HEADER_BYTES,
            )
        )  # fmt: skip
        self.host = host
        self._ending: asyncio.Task[None] | None = None
        host.on_failure = self.stop

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ctrl-C or SIGTERM: the first begins the end, the second is the end."""
        self._loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """Finish what has begun, within the time of grace; called again, stop at once."""
        if self._ending is not None:
            self.force_exit = True
            self.stop()
        else:
            self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        await self.host.end(self.host.options.grace)
        self.stop()

    def stop(self) -> None:
        self.should_exit = True


def run(host: Host, bound: socket.socket) -> None:
    """Serve until a signal ends it. Raises why the model could not be opened."""
    Server(host).run([bound])
    if host.failed is not None:
        raise host.failed
