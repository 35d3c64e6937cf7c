"""Splits a reply's text into text for people and calls of tools, as it comes."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence

from outsize.serve.events import CallArguments, CallStart, Part
from outsize.serve.tools.json_text import BLANK
from outsize.serve.tools.reading import Name, Reader, Reading, Source, Unreadable

Found = Part | CallStart | CallArguments


class CallParser:
    """Text until one of `marks` comes, then what a reader reads, then text again. What cannot be read as a
    call is text. White space around calls is dropped, and a mark that has only begun is held back."""

    def __init__(
        self,
        choice: int,
        names: Sequence[str],
        marks: Sequence[str],
        reader: Reader,
        bare: tuple[str, ...] = (),
    ) -> None:
        """`bare`: with these a reply, or what follows a call, may begin as a call without a mark."""
        self._choice, self._names, self._marks = choice, names, marks
        self._reader, self._bare = reader, bare
        self._held, self._blank = "", ""  # what may begin a mark; white space before a text
        self._said = False  # has there been text, since the start or the last call?
        self._calls = 0
        self._source = Source(names)
        self._reading: Reading[None] | None = None

    def push(self, text: str) -> Iterator[Found]:
        """What is certain by now: of each call's arguments at most one piece."""
        yield from _merged(self._run(text, False))

    def finish(self) -> Iterator[Found]:
        """What was held back, at the end."""
        yield from _merged(self._run("", True))

    def _run(self, text: str, last: bool) -> Iterator[Found]:
        while True:
            if self._reading is None:
                self._held += text
                yield from self._text(last)
            else:
                self._source.text += text
            if self._reading is None:
                return
            self._source.ended = last
            yield from self._read()
            if self._reading is not None:
                return
            text = ""

    def _text(self, last: bool) -> Iterator[Found]:
        """Text, to the next mark, with which a call begins."""
        mark, at = self._next_mark()
        if at >= 0:
            yield from self._say(self._held[:at])
            self._source = Source(self._names, self._held[at:], len(mark))
            self._reading, self._held = self._reader(self._source), ""
            return
        keep = 0 if last else self._overlap()
        certain, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        yield from self._say(certain)
        if last and not self._calls and self._blank:
            yield Part(self._choice, self._blank)

    def _next_mark(self) -> tuple[str, int]:
        """The mark that comes first, and where; -1: there is none."""
        text = self._held.lstrip(BLANK)
        if not self._said and text.startswith(self._bare):
            return "", len(self._held) - len(text)
        found = [(at, mark) for mark in self._marks if (at := self._held.find(mark)) >= 0]
        at, mark = min(found, default=(-1, ""))
        return mark, at

    def _overlap(self) -> int:
        """Characters at the end that may begin a mark."""
        body = self._held.lstrip(BLANK)
        if body and not self._said and any(bare.startswith(body) for bare in self._bare):
            return len(body)
        longest = max(len(mark) for mark in self._marks) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(mark.startswith(self._held[-size:]) for mark in self._marks):
                return size
        return 0

    def _say(self, text: str) -> Iterator[Part]:
        """Text for people. White space before it is held until there is some."""
        if not self._said:
            body = text.lstrip(BLANK)
            self._blank += text[: len(text) - len(body)]
            text = body if self._calls or not body else self._blank + body
            self._blank = self._blank if not body else ""
        if text:
            self._said = True
            yield Part(self._choice, text)

    def _read(self) -> Iterator[Found]:
        """As much of a call as there is; `_reading` is None once it is over."""
        source, reading = self._source, self._reading
        assert reading is not None
        try:
            for found in reading:
                if found is None:
                    return
                source.told = source.at
                if isinstance(found, Name):
                    yield CallStart(self._choice, self._calls, new_id(), found.name)
                    self._calls += 1
                else:
                    yield CallArguments(self._choice, self._calls - 1, found.text)
            self._said, self._blank = False, ""
        except Unreadable:
            yield from self._give_up(source)
            return
        self._reading, self._held = None, source.text[source.at :]

    def _give_up(self, source: Source) -> Iterator[Part]:
        """What has not been passed on is text, its first character in any case."""
        rest, self._reading = source.text[source.told :], None
        if rest:
            self._said = False
            yield from self._say(rest[:1])
            self._held = rest[1:]


def new_id() -> str:
    return "call_" + uuid.uuid4().hex[:24]


def _merged(events: Iterable[Found]) -> Iterator[Found]:
    """Pieces of one call's arguments that come together are one."""
    held: CallArguments | None = None
    for event in events:
        if isinstance(event, CallArguments) and held is not None and held.index == event.index:
            held = CallArguments(held.choice, held.index, held.text + event.text)
            continue
        if held is not None:
            yield held
        held = event if isinstance(event, CallArguments) else None
        if held is None:
            yield event
    if held is not None:
        yield held
