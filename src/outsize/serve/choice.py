"""One reply on its way: from what the engine gives to events, with tools parsed and log-probabilities beside
the text that they belong to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from dataclasses import replace

from outsize.engine.service import Answer, Delta
from outsize.errors import UnavailableError
from outsize.sampling.logprobs import TokenLogprob
from outsize.serve.events import CallStart, End, Event, Part
from outsize.serve.tools.format import Parser


class Choice:
    """One reply: its answer, what parses its text, and the prompt, if that is to be part of it."""

    def __init__(
        self,
        number: int,
        answer: Answer,
        held: HeldTokens,
        parser: Parser | None,
        echo: Part | None,
    ) -> None:
        self.number, self.answer = number, answer
        self._parser, self._echo, self._held = parser, echo, held
        self._has_calls = False

    async def events(self) -> AsyncIterator[Event]:
        """Raises OutsizeError; UnavailableError where the server broke the reply off."""
        if self._echo is not None:
            yield replace(self._echo, choice=self.number)
        async for delta in self.answer:
            for event in self._of(delta):
                yield event
        reply, stop = self.answer.reply, self.answer.stop
        if reply.finish == "cancelled":
            raise UnavailableError("the server ends: this reply was broken off")
        for event in self._last(stop):
            yield event
        called = self._has_calls and reply.finish == "stop"
        yield End(self.number, "tool_calls" if called else reply.finish, stop, reply)

    def _of(self, delta: Delta) -> Iterator[Event]:
        self._held.push(delta.tokens)
        if delta.reasoning:
            tokens = () if delta.text else self._held.take()
            yield Part(self.number, delta.reasoning, True, tokens)
        if delta.text and self._parser is None:
            yield Part(self.number, delta.text, False, self._held.take())
        elif delta.text and self._parser is not None:
            yield from self._parsed(self._parser.push(delta.text))

    def _parsed(self, parts: Iterable[Event]) -> Iterator[Event]:
        for event in parts:
            self._has_calls |= isinstance(event, CallStart)
            yield replace(event, tokens=self._held.take()) if isinstance(event, Part) else event

    def _last(self, stop: str | None) -> Iterator[Event]:
        if self._parser is not None:
            yield from self._parsed(self._parser.finish())
        if tokens := self._held.rest(stop):
            yield Part(self.number, "", False, tokens)


class HeldTokens:
    """Tokens with their log-probabilities, held back while they may be part of a stop string: what a reply
    stops before is not part of it."""

    def __init__(
        self,
        bytes_of: Callable[[int], bytes],
        stops: Iterable[str] = (),
        ends: Collection[int] = (),
    ) -> None:
        """`ends`: tokens that end a reply, which are left out."""
        self._bytes_of, self._end_tokens = bytes_of, ends
        self._stops = [stop.encode() for stop in stops]
        self._tokens = list[TokenLogprob]()
        self._ends = list[int]()  # of each held token, in the bytes
        self._bytes = b""

    def push(self, tokens: Iterable[TokenLogprob]) -> None:
        for token in (t for t in tokens if t.token not in self._end_tokens):
            self._tokens.append(token)
            if self._stops:
                self._bytes += self._bytes_of(token.token)
            self._ends.append(len(self._bytes))

    def take(self) -> tuple[TokenLogprob, ...]:
        """Those that are certain."""
        return self._first(sum(end <= len(self._bytes) - self._overlap() for end in self._ends))

    def rest(self, stop: str | None) -> tuple[TokenLogprob, ...]:
        """At the end: all, or those that begin before the stop string."""
        at = -1 if stop is None else self._bytes.find(stop.encode())
        if at < 0:
            return self._first(len(self._tokens))
        return self._first(sum(start < at for start in [0, *self._ends[:-1]]))

    def _first(self, count: int) -> tuple[TokenLogprob, ...]:
        taken, self._tokens = tuple(self._tokens[:count]), self._tokens[count:]
        cut = self._ends[count - 1] if count else 0
        self._bytes = self._bytes[cut:]
        self._ends = [end - cut for end in self._ends[count:]]
        return taken

    def _overlap(self) -> int:
        """Bytes at the end that may begin a stop string, or are one."""
        longest = max(map(len, self._stops), default=0)
        for size in range(min(longest, len(self._bytes)), 0, -1):
            if any(stop.startswith(self._bytes[-size:]) for stop in self._stops):
                return size
        return 0
