"""What is known of every request: its id, in a header; a line in the log; a count in the metrics."""

from __future__ import annotations

import json
import sys
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outsize.serve.counts import Counts
from outsize.serve.errors import ANTHROPIC
from outsize.serve.http import Call, call_of
from outsize.serve.options import ServeOptions

QUIET = ("/health", "/metrics")  # asked for every few seconds by what watches a server


class Track:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, options: ServeOptions, counts: Counts) -> None:
        self._app, self._options, self._counts = app, options, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = call_of(scope, receive)
        call.counts = self._counts

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers["x-request-id"] = call.id
                if call.dialect == ANTHROPIC:
                    headers["request-id"] = call.id  # where its clients look for it
                if call.ignored:
                    headers["x-outsize-ignored"] = ascii(",".join(call.ignored))[1:-1][:1000]
            await send(message)

        posts = call.request.method == "POST"
        self._counts.in_flight += posts
        try:
            await self._app(scope, receive, marked)
        finally:
            self._counts.in_flight -= posts
            self._counts.requests[call.dialect, call.status] += 1
            self._counts.tokens["prompt"] += call.prompt_tokens
            self._counts.tokens["new"] += call.new_tokens
            if call.request.url.path not in QUIET:
                log(call, self._options.json_log)


def log(call: Call, as_json: bool) -> None:
    """One line on stderr."""
    request, ms = call.request, 1000 * (time.perf_counter() - call.started)
    path = request.scope["path"][:200]  # what a URL is parsed from loses control characters
    if as_json:
        told = {
            "time": round(time.time(), 3), "id": call.id, "method": request.method, "path": path,
            "status": call.status, "ms": round(ms, 1), "prompt_tokens": call.prompt_tokens,
            "new_tokens": call.new_tokens, **({"error": call.error} if call.error else {}),
        }  # fmt: skip
        line = json.dumps(told)
    else:
        tokens = f" {call.prompt_tokens}+{call.new_tokens} tokens" if call.prompt_tokens else ""
        line = f"{request.method} {ascii(path)[1:-1]} {call.status} {ms:.0f} ms{tokens}"
        said = "".join(c if c.isprintable() else " " for c in call.error[:500])
        line += f" ({said})" if said else ""
    print(line, file=sys.stderr, flush=True)
