"""FunctionGemma: `<start_function_call>call:name{key:<escape>text<escape>,other:3}<end_function_call>`, a
notation of its own, in which texts stand between `<escape>` tokens.
https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from outsize.serve.tools.base import CallFormat
from outsize.serve.tools.lark import Function, after_text, either, literal, word
from outsize.serve.tools.reading import (
    Fragment,
    Reading,
    Source,
    Unreadable,
    blanks,
    closes,
    expect,
    more,
    skips,
    until,
)

OPEN, CLOSE, ESCAPE = "<start_function_call>", "<end_function_call>", "<escape>"
DEEPEST = 30


def writes(template: str) -> bool:
    """Does a chat template speak of this format?"""
    return OPEN in template


class Format(CallFormat):
    name = "functiongemma"
    show_tokens = (OPEN, CLOSE, ESCAPE)

    def example(self) -> str:
        return f"{OPEN}call:FUNCTION{{PARAMETER:{ESCAPE}VALUE{ESCAPE}}}{CLOSE}"

    def rules(self, found: Sequence[Function], choice: str, several: bool) -> list[str]:
        """Which function, and the notation of its arguments; not their schema."""
        begin, end, escape = (word(name, self.knows) for name in (OPEN, CLOSE, ESCAPE))
        calls = [literal(f"call:{f.name}") for f in found]
        more = f" ({begin} call {end})*" if several else ""
        return [
            *after_text(OPEN, f"call {end}{more}", choice, self.knows),
            f"call: {either(calls)} object",
            'object: "{" (member ("," member)*)? "}"',
            'member: /[^:{},<\\s]+/ ":" value',
            f'value: {escape} STRING {escape} | NUMBER | "true" | "false" | "null" | object | list',
            'list: "[" (value ("," value)*)? "]"',
            "STRING: /[^<]*/",
            "NUMBER: /-?[0-9]+(\\.[0-9]+)?/",
        ]

    def read(self, source: Source) -> Reading[None]:
        """A call, whose arguments are known once they are whole."""
        yield from expect(source, "call:")
        name = yield from until(source, "{")
        source.checked(name)
        found = yield from _object(source, 0)
        yield source.checked(name)
        yield Fragment(json.dumps(found, ensure_ascii=False))
        yield from closes(source, CLOSE)


def _object(source: Source, depth: int) -> Reading[dict[str, object]]:
    """After its opening bracket."""
    found: dict[str, object] = {}
    while not (yield from skips(source, "}")):
        key = yield from until(source, ":")
        found[key.strip()] = yield from _value(source, depth + 1)
        yield from skips(source, ",")
    return found


def _value(source: Source, depth: int) -> Reading[object]:
    if depth > DEEPEST:
        raise Unreadable
    yield from blanks(source)
    if (yield from skips(source, ESCAPE)):
        return (yield from until(source, ESCAPE))
    if (yield from skips(source, "{")):
        return (yield from _object(source, depth))
    if not (yield from skips(source, "[")):
        return (yield from _plain(source))
    found: list[object] = []
    while not (yield from skips(source, "]")):
        found.append((yield from _value(source, depth + 1)))
        yield from skips(source, ",")
    return found


def _plain(source: Source) -> Reading[object]:
    """A number, true, false or null; other text as it is."""
    start = source.at
    while True:
        if source.at == len(source.text):
            yield from more(source)
        elif source.text[source.at] in ",}]":
            break
        else:
            source.at += 1
    text = source.text[start : source.at].strip()
    if not text:
        raise Unreadable
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found
