"""Runs what was asked for: requests go to the engine, and what comes of all their choices are events."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from outsize.engine.service import Service
from outsize.errors import QueueFullError
from outsize.options import Options
from outsize.sampling.logprobs import TokenLogprob
from outsize.serve.ask import NONE, Ask
from outsize.serve.choice import Choice, HeldTokens
from outsize.serve.errors import invalid
from outsize.serve.events import Event, Part
from outsize.serve.token_text import token_bytes
from outsize.serve.tools.find import format_of
from outsize.serve.tools.format import ToolFormat

MOST_SEED = 1 << 63


@dataclass(frozen=True, slots=True)
class Encoded:
    """A request whose prompt is tokens, and the format that its tools are called in."""

    ask: Ask
    ids: list[int]
    format: ToolFormat | None
    echo: Echo | None


async def events(service: Service, *asks: Ask) -> Run:
    """The events of one or several requests, whose choices are counted through, once the first is admitted
    and none is found that can never run. As many as run at once are asked for at once; the others as those
    end, so that a request for many choices neither fills the queue nor is refused for its length.
    Raises OutsizeError, ApiError."""
    made = [await encoded(service, ask) for ask in asks]
    choices = list[Choice]()
    for one in made:
        for options in each(one.ask):
            choices.append(_choice(service, len(choices), one, options))
            if len(choices) > service.streams:
                await service.check(one.ids, options)
    try:
        await choices[0].begin()
        with suppress(QueueFullError):
            for choice in choices[1 : service.streams]:
                await choice.begin()
    except BaseException:
        for choice in choices:
            choice.cancel()
        raise
    return Run(choices, sum(len(one.ids) for one in made), service.streams)


def each(ask: Ask) -> Iterator[Options]:
    """The options of each choice: with a seed, that of choice i is i more."""
    for i in range(ask.count):
        seed = ask.options.seed
        yield ask.options if seed is None else replace(ask.options, seed=(seed + i) % MOST_SEED)


def _choice(service: Service, number: int, one: Encoded, options: Options) -> Choice:
    model = service.model
    ends = () if options.ignore_eos or one.ask.tells_end else model.pack.eos
    held = HeldTokens(partial(token_bytes, model), options.stop, ends)
    parser = None if one.format is None else one.format.parser(number, one.ask.tools)
    echo = None if one.echo is None else one.echo.part
    return Choice(number, partial(service.ask, one.ids, options), held, parser, echo)


async def encoded(service: Service, ask: Ask) -> Encoded:
    """A request with its prompt as tokens. Raises OutsizeError, ApiError."""
    ask, form = await _with_tools(service, ask)
    ids = await _ids(service, ask)
    return Encoded(ask, ids, form, Echo(service, ask, ids) if ask.echo else None)


async def _with_tools(service: Service, ask: Ask) -> tuple[Ask, ToolFormat | None]:
    """The request with its tools told to the model, and the grammar that their choice makes. Raises ApiError,
    OptionError."""
    if not ask.tools or ask.tool_choice == NONE:
        return ask, None
    messages = [m for m in ask.prompt if isinstance(m, Mapping)]
    if isinstance(ask.prompt, str) or len(messages) != len(ask.prompt):
        raise invalid("tools are for chats, not for a text to continue", "tools")
    if ask.options.schema is not None:
        raise invalid(
            "tools: a reply cannot both call tools and obey a schema; give one of them", "tools"
        )
    model = service.model
    form = format_of("\n".join(model.pack.chat_templates.values()), model.tokens.is_marker)
    told, variables = form.prompt(messages, ask.tools)
    grammar = await asyncio.to_thread(form.grammar, ask.tools, ask.tool_choice, ask.several_calls)
    arguments = {**(ask.options.template_args or {}), **variables}
    options = replace(
        ask.options, grammar=grammar, show_tokens=form.show_tokens, template_args=arguments or None
    )
    return replace(ask, prompt=told, options=options), form


async def _ids(service: Service, ask: Ask) -> list[int]:
    """The prompt's tokens."""
    prompt = ask.prompt
    if isinstance(prompt, str):
        return await service.encode(prompt, ask.options)
    tokens = [item for item in prompt if isinstance(item, int)]
    if len(tokens) == len(prompt):
        return tokens
    return await service.encode([item for item in prompt if not isinstance(item, int)], ask.options)


class Echo:
    """A prompt, as the first part of its replies: computed for the first, kept for the others."""

    def __init__(self, service: Service, ask: Ask, ids: Sequence[int]) -> None:
        self._service, self._ask, self._ids = service, ask, ids
        self._lock, self._made = asyncio.Lock(), list[Part]()

    async def part(self) -> Part:
        """The first token has no log-probability: NaN. Raises OutsizeError."""
        async with self._lock:
            if not self._made:
                self._made.append(Part(0, self._text(), tokens=await self._scored()))
        return self._made[0]

    def _text(self) -> str:
        prompt = self._ask.prompt
        return prompt if isinstance(prompt, str) else self._service.model.tokens.decode(self._ids)

    async def _scored(self) -> tuple[TokenLogprob, ...]:
        top = self._ask.options.logprobs
        if top is None:
            return ()
        width, ids = self._ask.options.width, self._ids
        later = await self._service.score(ids, top, width) if len(ids) > 1 else []
        return (TokenLogprob(self._ids[0], math.nan), *later)


class Run:
    """The events of all choices, as they come. Whoever leaves calls `cancel`."""

    def __init__(self, choices: Sequence[Choice], prompt_tokens: int, streams: int) -> None:
        self.choices, self.prompt_tokens = choices, prompt_tokens
        self._room = asyncio.Semaphore(streams)
        self._queue = asyncio.Queue[Event | Exception | None]()
        self._last: Exception | None = None  # what it ended by
        self._is_over = False
        self._running = len(choices)
        self._tasks = [asyncio.create_task(self._pump(choice)) for choice in choices]

    async def _pump(self, choice: Choice) -> None:
        try:
            async with self._room:
                async for event in choice.events():
                    self._queue.put_nowait(event)
        except Exception as e:
            self._queue.put_nowait(e)
        finally:
            self._running -= 1
            if not self._running:
                self._queue.put_nowait(None)

    async def some(self) -> list[Event]:
        """The next event and those that are there with it; none at the end. Raises what broke a reply off,
        after cancelling the others."""
        found: list[Event] = []
        while not found or not self._queue.empty():
            event = self._last if self._is_over else await self._queue.get()
            if event is None or isinstance(event, Exception):
                self._last, self._is_over = event, True
                break
            found.append(event)
        if not found and self._last is not None:
            self.cancel()
            raise self._last
        return found

    async def __aiter__(self) -> AsyncIterator[Event]:
        while found := await self.some():
            for event in found:
                yield event

    def cancel(self) -> None:
        """Stop computing all replies. Safe at any time, and more than once."""
        for choice in self.choices:
            choice.cancel()
        for task in self._tasks:
            task.cancel()
