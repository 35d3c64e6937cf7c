"""POST /v1/chat/completions: what is asked for, and how the answer is written, whole or as a stream."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from outsize.engine.model import Model
from outsize.serve.events import CallArguments, CallStart, End, Event, Part
from outsize.serve.host import Host
from outsize.serve.http import Call, post
from outsize.serve.openai_ask import ask_of
from outsize.serve.openai_common import Head, StreamWriter, usage
from outsize.serve.openai_logprobs import chat_logprobs
from outsize.serve.openai_schema import ChatBody
from outsize.serve.run import events
from outsize.serve.sse import Streamed, gathered


def routes(host: Host) -> list[BaseRoute]:
    answer = partial(chat, host)
    return list(post(host, "/v1/chat/completions", ChatBody, answer, "/chat/completions"))


async def chat(host: Host, call: Call, body: ChatBody) -> Response:
    """Raises ApiError, OutsizeError."""
    named = host.named(body.model)
    service = await host.service()
    ask = ask_of(call, body, named, service.model)
    run = await events(service, ask)
    if body.stream:
        head = Head.of("chat.completion.chunk", named.name, service.model)
        writer = ChatWriter(head, service.model, run.prompt_tokens, body.wants_usage)
        writer.count = ask.count
        return Streamed(call, run, writer, host.options.silence_s)
    found = await gathered(call, run)
    head = Head.of("chat.completion", named.name, service.model)
    replies = [event.reply for event in found if isinstance(event, End)]
    used = usage(replies, run.prompt_tokens, service.model)
    choices = [whole(found, i, service.model) for i in range(ask.count)]
    return JSONResponse(head.with_choices(choices, {"usage": used}))


def whole(found: list[Event], number: int, model: Model) -> dict[str, Any]:
    """One choice, complete."""
    mine = [event for event in found if event.choice == number]
    parts = [event for event in mine if isinstance(event, Part)]
    text = "".join(part.text for part in parts if not part.reasoning)
    thought = "".join(part.text for part in parts if part.reasoning)
    calls = [
        _call(event, _arguments(mine, event)) for event in mine if isinstance(event, CallStart)
    ]
    (end,) = [event for event in mine if isinstance(event, End)]
    message: dict[str, Any] = {
        "role": "assistant", "content": None if calls and not text else text, "refusal": None,
        **({"reasoning_content": thought} if thought else {}),
        **({"tool_calls": calls} if calls else {}),
    }  # fmt: skip
    logprobs = None
    if any(part.tokens for part in parts) or end.reply.options.get("logprobs") is not None:
        said = [token for part in parts if not part.reasoning for token in part.tokens]
        logprobs = {"content": chat_logprobs(said, model), "refusal": None}
    return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": end.reason}


def _call(start: CallStart, arguments: str) -> dict[str, Any]:
    function = {"name": start.name, "arguments": arguments}
    return {"id": start.id, "type": "function", "function": function}


def _arguments(mine: list[Event], start: CallStart) -> str:
    return "".join(e.text for e in mine if isinstance(e, CallArguments) and e.index == start.index)


class ChatWriter(StreamWriter):
    """A chat as chunks: the role, then what comes, then why it ended."""

    count = 1  # choices

    def start(self) -> bytes:
        role = {"role": "assistant", "content": None}
        return b"".join(self._chunk(i, role) for i in range(self.count))

    def write(self, event: Event) -> bytes:
        if isinstance(event, Part):
            return self._part(event)
        if isinstance(event, CallStart):
            call = {**_call(event, ""), "index": event.index}
            return self._chunk(event.choice, {"tool_calls": [call]})
        if isinstance(event, CallArguments):
            more = {"index": event.index, "function": {"arguments": event.text}}
            return self._chunk(event.choice, {"tool_calls": [more]})
        self.replies.append(event.reply)
        return self._chunk(event.choice, {}, event.reason)

    def _part(self, part: Part) -> bytes:
        name = "reasoning_content" if part.reasoning else "content"
        logprobs = None
        if part.tokens and not part.reasoning:
            logprobs = {"content": chat_logprobs(part.tokens, self.model), "refusal": None}
        if not part.text and logprobs is None:
            return b""
        return self._chunk(part.choice, {name: part.text} if part.text else {}, None, logprobs)

    def _chunk(
        self, choice: int, delta: dict[str, Any], reason: str | None = None, logprobs: object = None
    ) -> bytes:
        told = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.chunk([told])
