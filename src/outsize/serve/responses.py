"""OpenAI's responses: POST /v1/responses. Nothing is kept: a conversation is sent whole each time."""

from __future__ import annotations

import time
from functools import partial

from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from outsize.engine.model import Model
from outsize.serve import schema
from outsize.serve.ask import Ask
from outsize.serve.events import End, Part
from outsize.serve.host import Host
from outsize.serve.http import Call, post
from outsize.serve.messages import new_id, untold, with_adapter
from outsize.serve.openai_common import usage
from outsize.serve.openai_logprobs import chat_logprobs
from outsize.serve.responses_events import Frame, Frames, Kit, Writer, whole
from outsize.serve.responses_request import ask_of
from outsize.serve.responses_schema import Create, Tool
from outsize.serve.run import events
from outsize.serve.sse import Streamed, gathered


def routes(host: Host) -> list[BaseRoute]:
    return list(post(host, "/v1/responses", Create, partial(create, host), "/responses"))


async def create(host: Host, call: Call, body: Create) -> Response:
    """Raises ApiError, OutsizeError."""
    named = host.named(body.model)
    ask = with_adapter(ask_of(body), named.adapter)
    service = await host.service()
    if untold(ask, service.model.pack.chat_templates.values()):
        call.ignored.append("reasoning.effort")
    run = await events(service, ask)
    frames = Frames(head_of(body, ask, named.name), kit_for(service.model))
    if ask.stream:
        return Streamed(call, run, Writer(frames), host.options.silence_s)
    found = await gathered(call, run)
    return JSONResponse(whole(frame for event in found for frame in frames.of(event)))


def kit_for(model: Model) -> Kit:
    """What the frames of a model's responses are made with."""

    def used(end: End) -> Frame:
        told = usage([end.reply], end.reply.prompt_tokens, model)
        prompt, answer = told["prompt_tokens_details"], told["completion_tokens_details"]
        return {
            "input_tokens": told["prompt_tokens"],
            "input_tokens_details": {**prompt, "cache_write_tokens": 0},
            "output_tokens": told["completion_tokens"],
            "output_tokens_details": answer,
            "total_tokens": told["total_tokens"],
            "outsize": told["outsize"],
        }

    def logprobs(part: Part) -> list[Frame]:
        return [with_bytes(token) for token in chat_logprobs(part.tokens, model)]

    return Kit(new_id, time.time, used, logprobs)


def with_bytes(token: Frame) -> Frame:
    """A token of a response: where a chat has no bytes, of a control token, a list of none."""
    made = {**token, "bytes": token["bytes"] or []}
    top = token.get("top_logprobs")
    return {**made, "top_logprobs": [with_bytes(t) for t in top]} if isinstance(top, list) else made


def head_of(body: Create, ask: Ask, model: str) -> Frame:
    """The fields of a response that are known before it: mostly what was asked for."""
    options, config, choice = ask.options, body.reasoning, body.tool_choice
    format = body.text.format if body.text else None
    return {
        "id": new_id("resp_"), "object": "response", "created_at": int(time.time()), "model": model,
        "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
        "temperature": options.temperature, "top_p": options.top_p,
        "presence_penalty": options.presence_penalty, "frequency_penalty": options.frequency_penalty,
        "top_logprobs": options.logprobs or 0, "parallel_tool_calls": ask.several_calls,
        "tools": [_tool(tool) for tool in body.tools or [] if isinstance(tool, Tool)],
        "tool_choice": choice if isinstance(choice, str) else _shown(choice) or "auto",
        "text": {"format": _shown(format) or {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"effort": config.effort if config else None, "summary": None},
        "metadata": body.metadata or {}, "user": body.user, "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key, "service_tier": "default", "truncation": "disabled",
        "store": False, "background": False, "previous_response_id": None, "max_tool_calls": None,
    }  # fmt: skip


def _tool(tool: Tool) -> Frame:
    """As it was given, and null where it was not."""
    told = {"description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
    return {"type": "function", "name": tool.name, **told}


def _shown(body: schema.Body | None) -> Frame | None:
    """A part of the body as it was given."""
    return None if body is None else body.model_dump(by_alias=True, exclude_none=True)
