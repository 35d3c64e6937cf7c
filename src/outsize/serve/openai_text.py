"""POST /v1/completions: texts continued, one or several, with or without the prompts before them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from outsize.engine.model import Model
from outsize.options import Options
from outsize.serve.ask import Ask
from outsize.serve.errors import invalid
from outsize.serve.events import End, Event, Part
from outsize.serve.host import Host, Named
from outsize.serve.http import Call, post
from outsize.serve.openai_common import Head, StreamWriter, sampling, usage
from outsize.serve.openai_logprobs import TextLogprobs
from outsize.serve.openai_schema import TextBody
from outsize.serve.run import events
from outsize.serve.sse import Streamed, gathered

MAX_TOKENS = 16  # OpenAI's default
MOST_CHOICES = 2048


def routes(host: Host) -> list[BaseRoute]:
    return list(post(host, "/v1/completions", TextBody, partial(complete, host), "/completions"))


async def complete(host: Host, call: Call, body: TextBody) -> Response:
    """Raises ApiError, OutsizeError."""
    named = host.named(body.model)
    service = await host.service()
    asks = asks_of(body, named, service.model)
    run = await events(service, *asks)
    head = Head.of("text_completion", named.name, service.model)
    writer = TextWriter(head, service.model, run.prompt_tokens, body.wants_usage)
    writer.most_parts = 1 if body.max_tokens == 0 else None
    if body.stream:
        return Streamed(call, run, writer, host.options.silence_s)
    return JSONResponse(writer.whole(await gathered(call, run)))


def asks_of(body: TextBody, named: Named, model: Model) -> list[Ask]:
    """A request for each prompt. Raises ApiError, OptionError."""
    made = sampling(body, model)
    count, limit = body.n or 1, MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.best_of is not None and body.best_of != count:
        raise invalid(
            "best_of: outsize returns all that it computes; give it as n, or leave it out",
            "best_of",
        )
    if limit == 0 and not body.echo:
        raise invalid(
            "max_tokens is 0, and echo is not asked for: there is nothing to answer", "max_tokens"
        )
    prompts = prompts_of(body)
    if len(prompts) * count > MOST_CHOICES:
        raise invalid(
            f"{len(prompts)} prompts with n = {count} are more than {MOST_CHOICES:,} choices",
            "prompt",
        )
    options = Options(
        max_tokens=max(1, limit), logprobs=body.logprobs, adapter=named.adapter, raw=True, **made
    )
    echo, stream = bool(body.echo), bool(body.stream)
    return [
        Ask(prompt=p, options=options, count=count, echo=echo, stream=stream, tells_end=True)
        for p in prompts
    ]


def prompts_of(body: TextBody) -> Sequence[str | list[int]]:
    """Raises ApiError."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("prompt is an empty list; give a text, or token ids", "prompt")
    ids = [item for item in given if isinstance(item, int)]
    return [ids] if ids else [item for item in given if not isinstance(item, int)]


class TextWriter(StreamWriter):
    """Texts as chunks, or whole."""

    most_parts: int | None = None  # of each choice: 1 is the prompt alone

    def __init__(self, head: Head, model: Model, prompt_tokens: int, wants_usage: bool) -> None:
        super().__init__(head, model, prompt_tokens, wants_usage)
        self._parts = defaultdict[int, int](int)
        self._logprobs = defaultdict[int, TextLogprobs](lambda: TextLogprobs(model))

    def start(self) -> bytes:
        return b""

    def write(self, event: Event) -> bytes:
        if isinstance(event, Part):
            if not self._counts(event):
                return b""
            return self.chunk([self._choice(event.choice, [event], None)])
        if not isinstance(event, End):
            return b""
        self.replies.append(self._reply(event))
        return self.chunk([self._choice(event.choice, [], self._reason(event))])

    def whole(self, found: Sequence[Event]) -> dict[str, Any]:
        """The answer that is no stream."""
        parts = defaultdict[int, list[Part]](list)
        for event in found:
            if isinstance(event, Part) and self._counts(event):
                parts[event.choice].append(event)
        ends = sorted((e for e in found if isinstance(e, End)), key=lambda end: end.choice)
        self.replies = [self._reply(end) for end in ends]
        choices = [self._choice(e.choice, parts[e.choice], self._reason(e)) for e in ends]
        used = usage(self.replies, self.prompt_tokens, self.model)
        return self.head.with_choices(choices, {"usage": used})

    def _counts(self, part: Part) -> bool:
        self._parts[part.choice] += 1
        return self.most_parts is None or self._parts[part.choice] <= self.most_parts

    def _reply(self, end: End) -> Any:
        """Without the token that was computed beside a prompt alone."""
        return end.reply if self.most_parts is None else replace(end.reply, new_tokens=0)

    def _reason(self, end: End) -> str:
        return end.reason if self.most_parts is None else "length"

    def _choice(self, number: int, parts: Sequence[Part], reason: str | None) -> dict[str, Any]:
        text = "".join(part.text for part in parts)
        tokens = [token for part in parts for token in part.tokens]
        logprobs = self._logprobs[number].add(tokens) if tokens else None
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
