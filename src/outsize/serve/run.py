"""Runs what was asked for: requests go to the engine, and what comes of all their choices are events."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from outsize.engine.service import Answer, Service
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
    echo: Part | None


async def events(service: Service, *asks: Ask) -> Run:
    """The events of one or several requests, whose choices are counted through, once all are admitted.
    Raises OutsizeError, ApiError where one is not."""
    made = [await encoded(service, ask) for ask in asks]
    choices = list[Choice]()
    try:
        for one in made:
            for options in each(one.ask):
                answer = await service.ask(one.ids, options)
                choices.append(_choice(service, len(choices), answer, one))
    except BaseException:
        for choice in choices:
            choice.answer.cancel()
        raise
    return Run(choices, sum(len(one.ids) for one in made))


def each(ask: Ask) -> Iterator[Options]:
    """The options of each choice: with a seed, that of choice i is i more."""
    for i in range(ask.count):
        seed = ask.options.seed
        yield ask.options if seed is None else replace(ask.options, seed=(seed + i) % MOST_SEED)


def _choice(service: Service, number: int, answer: Answer, one: Encoded) -> Choice:
    options, model = one.ask.options, service.model
    ends = () if options.ignore_eos else model.pack.eos
    held = HeldTokens(partial(token_bytes, model), options.stop, ends)
    parser = None if one.format is None else one.format.parser(number, one.ask.tools)
    return Choice(number, answer, held, parser, one.echo)


async def encoded(service: Service, ask: Ask) -> Encoded:
    """A request with its prompt as tokens. Raises OutsizeError, ApiError."""
    ask, form = await _with_tools(service, ask)
    ids = await _ids(service, ask)
    return Encoded(ask, ids, form, await _echo(service, ask, ids) if ask.echo else None)


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
            "a reply cannot both call tools and obey a schema; give one", "response_format"
        )
    model = service.model
    form = format_of("\n".join(model.pack.chat_templates.values()), model.tokens.is_marker)
    told, variables = form.prompt(messages, ask.tools)
    grammar = await asyncio.to_thread(form.grammar, ask.tools, ask.tool_choice, ask.parallel_tools)
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


async def _echo(service: Service, ask: Ask, ids: Sequence[int]) -> Part:
    """The prompt, as the first part of a reply; the first token has no log-probability."""
    service.model.tokens.check(ids)
    text = ask.prompt if isinstance(ask.prompt, str) else service.model.tokens.decode(ids)
    top = ask.options.logprobs
    if top is None:
        return Part(0, text)
    scored = await service.score(ids, top) if len(ids) > 1 else []
    return Part(0, text, tokens=(TokenLogprob(ids[0], math.nan), *scored))


class Run:
    """The events of all choices, as they come. Whoever leaves calls `cancel`."""

    def __init__(self, choices: Sequence[Choice], prompt_tokens: int) -> None:
        self.choices, self.prompt_tokens = choices, prompt_tokens
        self._queue = asyncio.Queue[Event | Exception | None]()
        self._running = len(choices)
        self._tasks = [asyncio.create_task(self._pump(choice)) for choice in choices]

    async def _pump(self, choice: Choice) -> None:
        try:
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
        event = await self._queue.get()
        while event is not None and not isinstance(event, Exception):
            found.append(event)
            if self._queue.empty():
                return found
            event = self._queue.get_nowait()
        if found:
            self._queue.put_nowait(event)  # for the next call: nothing that counts comes after it
        elif isinstance(event, Exception):
            self.cancel()
            raise event
        return found

    async def __aiter__(self) -> AsyncIterator[Event]:
        while found := await self.some():
            for event in found:
                yield event

    def cancel(self) -> None:
        """Stop computing all replies. Safe at any time, and more than once."""
        for choice in self.choices:
            choice.answer.cancel()
        for task in self._tasks:
            task.cancel()
