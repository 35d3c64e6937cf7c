"""Ollama's dialect: chat, generate, and what its clients ask about models."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from outsize.engine.service import Service
from outsize.serve.ask import Ask
from outsize.serve.errors import ApiError, invalid
from outsize.serve.host import Host, Named
from outsize.serve.http import Call, Endpoint, get, post
from outsize.serve.messages import untold, with_adapter
from outsize.serve.ollama_events import Frame, Frames, Writer, line, now, whole
from outsize.serve.ollama_models import Models, known_as
from outsize.serve.ollama_request import (
    chat_ask,
    generate_ask,
    keeps_for,
    only_loads,
    without_effect,
)
from outsize.serve.ollama_schema import Chat, Embed, Generate
from outsize.serve.ollama_schema import Named as NamedBody
from outsize.serve.openai_logprobs import chat_logprobs
from outsize.serve.run import encoded, events
from outsize.serve.sse import NDJSON, Streamed, gathered
from outsize.version import __version__

SPOKEN = (
    "0.12.0"  # the version of Ollama whose interface this is: clients look whether it is new enough
)
GREETING = "Ollama is running"  # what its clients look for at /
REFUSED = {
    "/api/create": ["POST"], "/api/copy": ["POST"], "/api/delete": ["DELETE"], "/api/push": ["POST"],
    "/api/blobs/{digest:path}": ["POST", "HEAD", "GET"],
}  # fmt: skip


def routes(host: Host) -> list[BaseRoute]:
    models = Models(host)
    return [
        *post(host, "/api/chat", Chat, partial(chat, host)),
        *post(host, "/api/generate", Generate, partial(generate, host)),
        *post(host, "/api/embed", Embed, embed, "/api/embeddings"),
        *post(host, "/api/show", NamedBody, partial(show, host, models)),
        *post(host, "/api/pull", NamedBody, partial(pull, host)),
        *get("/api/tags", _of(models.tags)),
        *get("/api/ps", _of(models.loaded)),
        *get("/api/version", _of(version)),
        ForPrograms("/", Endpoint(greet), methods=["GET"]),
        *(Route(path, Endpoint(refuse), methods=methods) for path, methods in REFUSED.items()),
    ]


class ForPrograms(Route):
    """A route for those who do not take HTML: at /, browsers get the page."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        accept = Headers(scope=scope).get("accept", "*/*") if scope["type"] == "http" else ""
        wants_page = "text/html" in accept or "*/*" in accept
        return (Match.NONE, {}) if wants_page else super().matches(scope)


async def greet(call: Call) -> Response:
    return PlainTextResponse(GREETING)


def _of(function: Callable[[], Frame]) -> Callable[[Call], Awaitable[Response]]:
    async def answer(call: Call) -> Response:
        return JSONResponse(function())

    return answer


def version() -> Frame:
    return {"version": SPOKEN, "outsize": __version__}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for an answer, with all that writing it needs."""

    service: Service
    ask: Ask
    frames: Frames


async def chat(host: Host, call: Call, body: Chat) -> Response:
    """Raises ApiError, OutsizeError."""
    named = _named(host, body.model)
    if only_loads(body):
        return await _load(host, named, body)
    asked = await _asked(host, call, body, chat_ask(body, host.context), named)
    return await _answer(host, call, asked)


async def generate(host: Host, call: Call, body: Generate) -> Response:
    """Raises ApiError, OutsizeError."""
    named = _named(host, body.model)
    if only_loads(body):
        return await _load(host, named, body)
    asked = await _asked(host, call, body, generate_ask(body, host.context), named)
    if not body.raw:
        service = asked.service
        ids = [*(body.context or []), *(await encoded(service, asked.ask)).ids]
        service.model.tokens.check(ids)
        asked = replace(asked, ask=replace(asked.ask, prompt=ids))
        asked.frames.context = lambda text: [*ids, *service.model.tokens.encode(text)]
    elif body.context:
        raise invalid(
            "context: a raw prompt goes on with nothing; write it into the prompt", "context"
        )
    return await _answer(host, call, asked)


def _named(host: Host, name: str | None) -> Named:
    return host.named(known_as(name, host.names()))


async def _asked(host: Host, call: Call, body: Chat | Generate, ask: Ask, named: Named) -> Asked:
    call.ignored += without_effect(body)
    if keeps_for(body.keep_alive) is not None:  # of a request for an answer; `_load` honours it
        call.ignored.append("keep_alive")
    began = time.perf_counter()
    service = await host.service()
    frames = Frames(named.name, now(), isinstance(body, Chat))
    frames.load_s = time.perf_counter() - began
    if body.logprobs:
        frames.logprobs = lambda part: chat_logprobs(part.tokens, service.model)
    if untold(ask, service.model.pack.chat_templates.values()):
        call.ignored.append("think")
    return Asked(service, with_adapter(ask, named.adapter), frames)


async def _answer(host: Host, call: Call, asked: Asked) -> Response:
    run = await events(asked.service, asked.ask)
    if asked.ask.stream:
        return Streamed(call, run, Writer(asked.frames), host.options.silence_s)
    found = await gathered(call, run)
    return JSONResponse(whole(frame for event in found for frame in asked.frames.of(event)))


async def _load(host: Host, named: Named, body: Chat | Generate) -> Response:
    """Opens the model, or, with `keep_alive` 0, closes it."""
    closes = keeps_for(body.keep_alive) == 0
    await (host.unload_unused() if closes else host.service())
    frame = Frames(named.name, now(), isinstance(body, Chat)).last("unload" if closes else "load")
    return _one(frame, body.stream)


def _one(frame: Frame, stream: bool | None) -> Response:
    """One object, as a stream or whole: the same bytes, but for the type."""
    return Response(line(frame), media_type="application/json" if stream is False else NDJSON)


async def embed(call: Call, body: Embed) -> Response:
    """Raises ApiError."""
    raise invalid(
        "this model writes text, and makes no embeddings; ask a model that was made for them"
    )


async def show(host: Host, models: Models, call: Call, body: NamedBody) -> Response:
    """Raises ApiError for a name that is not known."""
    _named(host, body.model or body.name)
    await host.service()
    return JSONResponse(models.shown())


async def pull(host: Host, call: Call, body: NamedBody) -> Response:
    """Raises ApiError for a model that is not here: a server has one, and fetches no others."""
    _named(host, body.model or body.name)
    return _one({"status": "success"}, body.stream)


async def refuse(call: Call) -> Response:
    raise ApiError(
        status=501,
        message=f"{call.request.url.path[:80]}: this server has the model that it was started with; start "
        "another with `outsize serve MODEL`",
    )
