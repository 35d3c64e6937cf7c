"""Runs what was asked for: from requests to the engine, and from its deltas to events of all choices."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace

from outsize.engine.service import Answer, Delta, Service
from outsize.errors import UnavailableError
from outsize.options import Options
from outsize.sampling.logprobs import TokenLogprob
from outsize.serve.ask import Ask
from outsize.serve.events import CallStart, End, Event, Part
from outsize.serve.tools.format import Parser, ToolFormat

MOST_SEED = 1 << 63


async def events(service: Service, *asks: Ask, tools: ToolFormat | None = None) -> Run:
    """The events of one or several requests, whose choices are counted through, once all are admitted.
    Raises OutsizeError where one is not."""
    answers, choices, size = list[Answer](), list[Choice](), 0
    try:
        for ask in asks:
            ids = await _ids(service, ask)
            size += len(ids)
            shown = await _echo(service, ask, ids) if ask.echo else None
            for options in each(ask):
                answers.append(await service.ask(ids, options))
                parser = tools.parser(len(choices), ask.tools) if tools and ask.tools else None
                choices.append(Choice(len(choices), answers[-1], parser, shown))
    except BaseException:
        for answer in answers:
            answer.cancel()
        raise
    return Run(choices, size)


def each(ask: Ask) -> Iterator[Options]:
    """The options of each choice: with a seed, that of choice i is i more."""
    for i in range(ask.count):
        seed = ask.options.seed
        yield ask.options if seed is None else replace(ask.options, seed=(seed + i) % MOST_SEED)


async def _ids(service: Service, ask: Ask) -> list[int]:
    """The prompt's tokens."""
    prompt = ask.prompt
    if isinstance(prompt, str):
        return await service.encode(prompt, ask.options)
    tokens = [item for item in prompt if isinstance(item, int)]
    if len(tokens) == len(prompt):
        return tokens
    messages = [item for item in prompt if not isinstance(item, int)]
    options = ask.options
    if ask.tools:
        options = replace(
            options, template_args={**(options.template_args or {}), "tools": list(ask.tools)}
        )
    return await service.encode(messages, options)


async def _echo(service: Service, ask: Ask, ids: Sequence[int]) -> Part:
    """The prompt, as the first part of a reply; the first token has no log-probability."""
    text = ask.prompt if isinstance(ask.prompt, str) else service.model.tokens.decode(ids)
    top = ask.options.logprobs
    if top is None:
        return Part(0, text)
    service.model.tokens.check(ids)
    scored = await service.score(ids, top) if len(ids) > 1 else []
    return Part(0, text, tokens=(TokenLogprob(ids[0], math.nan), *scored))


class Choice:
    """One reply on its way: its answer, and what parses its text."""

    def __init__(
        self, number: int, answer: Answer, parser: Parser | None, echo: Part | None
    ) -> None:
        self.number, self.answer = number, answer
        self._parser, self._echo = parser, echo
        self._tokens = list[TokenLogprob]()  # that came before the text that they make
        self._has_calls = False

    async def events(self) -> AsyncIterator[Event]:
        if self._echo is not None:
            yield replace(self._echo, choice=self.number)
        async for delta in self.answer:
            for event in self._of(delta):
                yield event
        for event in self._last():
            yield event
        reply, stop = self.answer.reply, self.answer.stop
        if reply.finish == "cancelled":
            raise UnavailableError("the server ends; this reply was broken off")
        called = self._has_calls and reply.finish == "stop"
        yield End(self.number, "tool_calls" if called else reply.finish, stop, reply)

    def _of(self, delta: Delta) -> Iterator[Event]:
        self._tokens += delta.tokens
        if delta.reasoning:
            yield self._with_tokens(Part(self.number, delta.reasoning, reasoning=True))
        if delta.text and self._parser is None:
            yield self._with_tokens(Part(self.number, delta.text))
        elif delta.text and self._parser is not None:
            yield from self._parsed(self._parser.push(delta.text))

    def _parsed(self, parts: Iterator[Event]) -> Iterator[Event]:
        for event in parts:
            self._has_calls |= isinstance(event, CallStart)
            yield self._with_tokens(event) if isinstance(event, Part) else event

    def _last(self) -> Iterator[Event]:
        if self._parser is not None:
            yield from self._parsed(self._parser.finish())
        if self._tokens:
            yield self._with_tokens(Part(self.number, ""))

    def _with_tokens(self, part: Part) -> Part:
        tokens, self._tokens = tuple(self._tokens), []
        return replace(part, tokens=tokens) if tokens else part


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
            self._queue.put_nowait(event)  # nothing comes after it that would be read
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
