"""Anthropic's dialect: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from functools import partial

from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from outsize.serve.anthropic_events import Frames, Writer, whole
from outsize.serve.anthropic_request import ask_of, shows_thinking
from outsize.serve.anthropic_schema import CountTokens, Create
from outsize.serve.host import Host
from outsize.serve.http import Call, post
from outsize.serve.messages import new_id, untold, with_adapter
from outsize.serve.run import encoded, events
from outsize.serve.sse import Streamed, gathered


def routes(host: Host) -> list[BaseRoute]:
    return [
        *post(host, "/v1/messages", Create, partial(create, host)),
        *post(host, "/v1/messages/count_tokens", CountTokens, partial(count_tokens, host)),
    ]


async def create(host: Host, call: Call, body: Create) -> Response:
    """Raises ApiError, OutsizeError."""
    named = host.named(body.model)
    ask = with_adapter(ask_of(body), named.adapter)
    service = await host.service()
    if untold(ask, service.model.pack.chat_templates.values()):
        call.ignored.append("thinking")
    run = await events(service, ask)
    frames = Frames(new_id("msg_"), named.name, run.prompt_tokens, shows_thinking(body))
    if ask.stream:
        return Streamed(call, run, Writer(frames, call.id), host.options.silence_s)
    found = await gathered(call, run)
    return JSONResponse(whole([frames.start(), *(f for e in found for f in frames.of(e))]))


async def count_tokens(host: Host, call: Call, body: CountTokens) -> Response:
    """Raises ApiError, OutsizeError."""
    host.named(body.model)
    made = await encoded(await host.service(), ask_of(body))
    return JSONResponse({"input_tokens": len(made.ids)})
