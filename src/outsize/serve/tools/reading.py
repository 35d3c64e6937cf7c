"""Reads calls of tools out of a text that is still coming. A reader is a generator: it takes from a Source,
yields what it found, yields None when it needs more text, and raises Unreadable for what is no call."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import TypeVar

from outsize.serve.tools.json_text import BLANK, Scanner

T = TypeVar("T")
ARGUMENTS = ("arguments", "parameters")  # what models call them
FIRST = ("name", "type", "id")  # keys that a call begins with
FENCE = "```"


class Unreadable(Exception):
    """This text is no call."""


@dataclass(frozen=True, slots=True)
class Name:
    """A call of this tool begins."""

    name: str


@dataclass(frozen=True, slots=True)
class Fragment:
    """More of its arguments, as JSON."""

    text: str


Reading = Generator[Name | Fragment | None, None, T]


@dataclass(slots=True)
class Source:
    """A text that is still coming, and how far it has been read. Up to `told` it has been passed on."""

    names: Collection[str]  # of the tools there are
    text: str = ""
    at: int = 0
    told: int = 0
    ended: bool = False

    def checked(self, name: object) -> Name:
        """Raises Unreadable for a tool that there is not."""
        if not isinstance(name, str) or name not in self.names:
            raise Unreadable
        return Name(name)


Reader = Callable[[Source], Reading[None]]


def more(source: Source) -> Reading[None]:
    """Wait for text. Raises Unreadable if none comes any more."""
    if source.ended:
        raise Unreadable
    yield None


def sees(source: Source, word: str) -> Reading[bool]:
    """Does the text go on with this word? At the end, and where it may not: False."""
    while True:
        rest = source.text[source.at : source.at + len(word)]
        if rest == word or not word.startswith(rest) or source.ended:
            return rest == word
        yield None


def skips(source: Source, word: str) -> Reading[bool]:
    """Pass over a word, if it is there."""
    if (yield from sees(source, word)):
        source.at += len(word)
        return True
    return False


def closes(source: Source, word: str) -> Reading[None]:
    """Pass over a closing mark, if it is there, or as much of it as there is at the end."""
    if not (yield from skips(source, word)) and source.ended:
        rest = source.text[source.at :]
        source.at += len(rest) if word.startswith(rest) else 0


def expect(source: Source, word: str) -> Reading[None]:
    if not (yield from skips(source, word)):
        raise Unreadable


def blanks(source: Source) -> Reading[None]:
    """Pass over white space."""
    while True:
        while source.at < len(source.text) and source.text[source.at] in BLANK:
            source.at += 1
        if source.at < len(source.text) or source.ended:
            return
        yield None


def until(source: Source, word: str) -> Reading[str]:
    """The text before a word, which is passed over."""
    while (found := source.text.find(word, source.at)) < 0:
        yield from more(source)
    text, source.at = source.text[source.at : found], found + len(word)
    return text


def value(source: Source, tells: bool = False) -> Reading[str]:
    """A value of JSON, but no number alone, which has no end. `tells`: passed on as it comes."""
    scanner, start = Scanner(), source.at
    while not scanner.done:
        begun = source.at
        while source.at < len(source.text) and not scanner.done:
            if not scanner.push(source.text[source.at]):
                if tells and source.at > begun:
                    yield Fragment(source.text[begun : source.at])
                raise Unreadable
            source.at += 1
        if tells and source.at > begun:
            yield Fragment(source.text[begun : source.at])
        if not scanner.done:
            yield from more(source)
    return source.text[start : source.at]


def arguments(source: Source) -> Reading[None]:
    """The arguments of a call that has begun: an object, passed on as it comes."""
    if not (yield from sees(source, "{")):
        raise Unreadable
    yield from value(source, tells=True)


def bare_call(source: Source) -> Reading[None]:
    """A call without a mark, perhaps in a block of code."""
    fenced = yield from skips(source, FENCE)
    if fenced and (yield from until(source, "\n")).strip() not in ("", "json"):
        raise Unreadable
    yield from blanks(source)
    yield from call_object(source, marked=False)
    source.told = source.at
    if fenced:
        yield from blanks(source)
        yield from closes(source, FENCE)


def call_object(source: Source, marked: bool = True) -> Reading[None]:
    """A call as one object of JSON: {"name": ..., "arguments": {...}}, in any order, perhaps with more. One
    that no mark begins must look like a call from its first key on, and have arguments."""
    yield from expect(source, "{")
    name, held, keys = "", "", 0
    while True:
        yield from blanks(source)
        key, keys = _string((yield from value(source))), keys + 1
        if not marked and keys == 1 and key not in FIRST:
            raise Unreadable
        yield from blanks(source)
        yield from expect(source, ":")
        yield from blanks(source)
        if key == "name":
            name = _string((yield from value(source)))
            source.checked(name)
        elif key in ARGUMENTS and name and (yield from sees(source, "{")):
            yield source.checked(name)
            yield from arguments(source)
            held = "told"
        else:
            text = yield from _any(source)
            held = text if key in ARGUMENTS else held
        yield from blanks(source)
        if not (yield from skips(source, ",")):
            break
    yield from expect(source, "}")
    if held != "told":
        if not held and not marked:
            raise Unreadable
        text = _as_object(held or "{}")
        yield source.checked(name)
        yield Fragment(text)


def _any(source: Source) -> Reading[str]:
    """Any value of JSON, a number, too."""
    if source.text[source.at : source.at + 1] in (*'{["tfn',):
        return (yield from value(source))
    start = source.at
    while True:
        if source.at == len(source.text):
            yield from more(source)
        elif source.text[source.at] in ",}]":
            return source.text[start : source.at]
        else:
            source.at += 1


def _string(text: str) -> str:
    """Raises Unreadable."""
    found = json.loads(text)
    if not isinstance(found, str):
        raise Unreadable
    return found


def _as_object(text: str) -> str:
    """Arguments that are an object, or a text of one. Raises Unreadable."""
    try:
        found = json.loads(text)
        found = json.loads(found) if isinstance(found, str) else found
    except (ValueError, RecursionError):
        raise Unreadable from None
    if not isinstance(found, dict):
        raise Unreadable
    is_whole = not any("\ud800" <= c <= "\udfff" for c in json.dumps(found, ensure_ascii=False))
    return json.dumps(
        found, ensure_ascii=not is_whole
    )  # half of a pair can be written escaped alone
