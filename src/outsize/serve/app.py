"""The web application: all dialects' routes, behind the checks of who may ask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from outsize.serve import (
    anthropic,
    embeddings,
    health,
    live,
    metrics,
    models,
    ollama,
    openai_chat,
    openai_text,
    openapi,
    responses,
    tokenize,
)
from outsize.serve.errors import ApiError
from outsize.serve.host import Host
from outsize.serve.http import call_of, refusal
from outsize.serve.security import Guard
from outsize.serve.track import Track

OPENAI = (openai_chat, openai_text, responses, embeddings, models)
DIALECTS = (*OPENAI, anthropic, ollama, tokenize, health, metrics)
SHOWN_HEADERS = ["x-request-id", "x-outsize-ignored", "x-should-retry", "retry-after"]


def routes(host: Host) -> list[BaseRoute]:
    """Of all dialects, and the page's, which no program needs described: one of them never ends."""
    found = [route for dialect in DIALECTS for route in dialect.routes(host)]
    return [*found, *openapi.routes(found), *live.routes(host)]


def application(host: Host) -> Starlette:
    """The ASGI application that serves a host's model, which is opened as it starts."""
    options = host.options

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        host.start()
        yield
        await host.end(0.0)

    layers = [Middleware(Track, options, host.counts)]
    if options.cors:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(options.cors),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=SHOWN_HEADERS,
            )
        )
    layers.append(Middleware(Guard, options))
    return Starlette(
        routes=routes(host),
        middleware=layers,
        exception_handlers={HTTPException: _no_route},
        lifespan=lifespan,
    )


async def _no_route(request: Request, error: Exception) -> Response:
    """Starlette's own refusals, 404 and 405, in the dialect's shape."""
    call = call_of(request.scope, request.receive)
    if isinstance(error, HTTPException) and error.status_code == 405:
        allowed = dict(error.headers or {}).get("Allow", "")
        told = ApiError(status=405, message=f"{request.method} is not for this path; {allowed} is")
        response = refusal(call, told)
        response.headers["allow"] = allowed
        return response
    path = request.url.path[:200]
    return refusal(
        call, ApiError(status=404, message=f"there is no {path!r} here", code="not_found")
    )
