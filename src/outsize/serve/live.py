"""The page, and what its picture shows: GET / and /page/..., /v1/placement (what is where, once) and /v1/live
(server-sent events, twice a second: reads by layer, memory, keys and values, rates)."""

from __future__ import annotations

import asyncio
import mimetypes
import time
from collections.abc import AsyncIterator
from functools import cache, partial
from pathlib import Path

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute

from outsize.engine.service import Service
from outsize.errors import ClosedError, UnavailableError
from outsize.pack.outline import of_pack
from outsize.plan.fixed import kv_bytes
from outsize.report.weights_now import WeightsNow
from outsize.serve.errors import ApiError
from outsize.serve.host import ENDING, Host
from outsize.serve.http import Call, get
from outsize.serve.sse import SSE, data
from outsize.system import memory

PAGE = Path(__file__).parent / "page"
FRAME_S = 0.5
MOST_WATCHERS = 16
SECURITY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes(host: Host) -> list[BaseRoute]:
    watchers = Watchers(host)
    return [
        *get("/", partial(file, "index.html")),
        *get("/page/{name:path}", page_file),
        *get("/v1/placement", partial(placement, host)),
        *get("/v1/live", watchers.live),
    ]


@cache
def files() -> dict[str, Path]:
    """The page's files by the name that the browser asks for: nothing else is ever read."""
    found = (path for path in PAGE.rglob("*") if path.suffix in (".html", ".js", ".css", ".svg"))
    return {path.relative_to(PAGE).as_posix(): path for path in found}


async def file(name: str, call: Call) -> Response:
    """Raises ApiError."""
    if name not in files():
        raise ApiError(status=404, message=f"the page has no file {name[:200]!r}")
    kind = mimetypes.guess_type(name)[0] or "text/plain"
    kind = "text/javascript" if name.endswith(".js") else kind
    return Response(files()[name].read_bytes(), media_type=kind, headers=SECURITY)


async def page_file(call: Call) -> Response:
    return await file(call.request.path_params["name"], call)


async def placement(host: Host, call: Call) -> Response:
    """As `outsize plan --json` says it, and by layer. Does not wake a model that was closed. Raises
    UnavailableError."""
    service = host.running
    if service is None:
        raise UnavailableError("the model is not open now, so nothing is in memory", 1.0)
    plan = service.model.placement
    told = {
        "model": host.name,
        **plan.to_json(),
        "kv_tokens": plan.kv_tokens,
        "kv_bytes_a_token": kv_bytes(of_pack(service.model.pack)),
        "parts": WeightsNow(service.model).parts(),
    }
    return JSONResponse(told)


class Watchers:
    """Who looks at the live picture, so many at most."""

    def __init__(self, host: Host) -> None:
        self._host, self._count = host, 0

    async def live(self, call: Call) -> Response:
        """Frames, until the client leaves or the server ends. Raises ApiError."""
        if self._count >= MOST_WATCHERS:
            raise ApiError(
                status=429,
                message=f"{self._count} pages show the live picture already; close one of them",
                retry_after_s=5.0,
            )
        return StreamingResponse(self._frames(), media_type=SSE, headers=SECURITY)

    async def _frames(self) -> AsyncIterator[bytes]:
        self._count += 1
        try:
            frames = Frames(self._host)
            while self._host.state != ENDING:
                yield data(frames.next())
                await asyncio.sleep(FRAME_S)
        finally:
            self._count -= 1


class Frames:
    """One watcher's frames: each says what has happened since the one before."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._weights: tuple[Service, WeightsNow] | None = None
        self._then, self._tokens = time.monotonic(), 0

    def next(self) -> dict[str, object]:
        now = time.monotonic()
        told: dict[str, object] = {
            "state": self._host.state,
            "seconds": round(max(now - self._then, 0.001), 3),
            "process_bytes": memory.resident(),
        }
        service = self._host.running
        if service is not None:
            try:
                told |= self._of(service, now - self._then)
            except ClosedError:  # between two requests
                self._weights = None
        self._then = now
        return told

    def _of(self, service: Service, seconds: float) -> dict[str, object]:
        """Of an open model. Raises ClosedError."""
        is_new = self._weights is None or self._weights[0] is not service
        if is_new:
            self._weights = service, WeightsNow(service.model)
        assert self._weights is not None
        load, totals, weights = service.load(), service.totals, self._weights[1].look()
        tokens = totals.new_tokens + sum(stream.new_tokens for stream in load.streams)
        new, self._tokens = 0 if is_new else max(0, tokens - self._tokens), tokens
        streams = [
            {"number": s.number, "state": s.state, "kv_tokens": s.kv_tokens} for s in load.streams
        ]
        return {
            "budget_bytes": service.model.placement.budget,
            "running": load.running,
            "waiting": load.waiting,
            "kv_tokens": load.kv_tokens,
            "kv_room": load.kv_room,
            "prefix_tokens": load.prefix_tokens,
            "streams": streams,
            "drafts": [list(pair) for pair in totals.by_position],  # of replies that have ended
            "new_tokens": new,
            "tokens_per_s": round(new / seconds, 2) if seconds > 0 else 0.0,
            **weights,
        }
