"""Text that people type stays text: the names of control tokens in it never become control tokens.

A chat template joins what the model's makers wrote and what users wrote into one string. So a control
token's name in a user's string is put between two marks before the template runs; after it, each marked name
is broken by a mark inside, which the tokenizer removes after it has looked for control tokens. A template
that splits at a name still finds it; one that asks whether a text begins with a name does not. What nobody
marked is encoded as ever. A template that takes letters out of a text, or changes them, can still make a name
of what was none.
The idea is that of `transformers`' sanitize_control_tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: no text has them
BREAK = OPEN
LONGEST = (
    200  # characters of a name that shares its beginning with others, or that a text may begin
)
_ESCAPED = {
    f"\\u{ord(mark):04x}": mark for mark in (OPEN, CLOSE)
}  # as a template's tojson may write them


class Marks:
    """The marking of one vocabulary's control tokens (those of one character cannot be marked)."""

    def __init__(self, control: Sequence[str]) -> None:
        self._control = control

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted((c for c in self._control if len(c) > 1), key=len, reverse=True)

    @cached_property
    def _either(self) -> str:
        return _any_of(self._sorted)

    @cached_property
    def _names(self) -> re.Pattern[str]:
        return re.compile(self._either)

    @cached_property
    def _marked(self) -> re.Pattern[str]:
        lone = f"{OPEN}({self._either})|({self._either}){CLOSE}"
        return re.compile(f"{OPEN}([^{OPEN}{CLOSE}]+){CLOSE}|{lone}")

    @cached_property
    def _in_order(self) -> list[str]:
        return sorted(self._sorted)

    def _begins_one(self, text: str) -> bool:
        """Is that the beginning of a longer name?"""
        at = bisect_left(self._in_order, text + "\0")  # the first after it
        return at < len(self._in_order) and self._in_order[at].startswith(text)

    def mark(self, value: object) -> object:
        """The same value with control tokens' names marked in its strings; in keys, but for their ends."""
        if isinstance(value, str):
            return self._mark_end(self._mark_names(value))
        if isinstance(value, Mapping):
            return {self._mark_names(str(key)): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def _mark_names(self, text: str) -> str:
        text = text.replace(OPEN, "").replace(CLOSE, "")
        for escaped in _ESCAPED:  # typed, not written by a template's tojson
            text = text.replace(escaped, escaped[:3] + BREAK + escaped[3:])
        return self._names.sub(lambda m: OPEN + m[0] + CLOSE, text)

    def names(self, text: str) -> list[str]:
        """The control tokens' names in a text."""
        return self._names.findall(text)

    def _mark_end(self, text: str) -> str:
        """With a name marked that the text begins at its end, and what follows it could finish."""
        body = text.rstrip()
        longest = min(LONGEST, len(self._sorted[0])) if self._sorted else 0
        for n in range(min(longest, len(body)), 0, -1):
            if self._begins_one(body[-n:]):
                return body[:-n] + OPEN + body[-n:] + CLOSE + text[len(body) :]
        return text

    def broken(self, text: str) -> str:
        """A rendered text whose marked names are broken; a mark that lost its other half breaks it, too."""
        for escaped, mark in _ESCAPED.items():
            text = text.replace(escaped, mark)
        if OPEN not in text and CLOSE not in text:
            return text
        text = self._marked.sub(lambda m: BREAK.join(m[1] or m[2] or m[3]) + BREAK, text)
        return text.replace(CLOSE, BREAK)


def _any_of(names: Sequence[str]) -> str:
    """A pattern of the longest of these names, by their common beginnings: one after the other, thousands of
    them would be tried at each place."""
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for c in name if len(name) <= LONGEST else "":
            node = node.setdefault(c, {})
        if node is not tree:
            node[""] = {}
    long = [re.escape(name) for name in names if len(name) > LONGEST]
    return "|".join([*long, *([_pattern(tree)] if tree else [])]) or "(?!)"


def _pattern(node: dict[str, Any]) -> str:
    rest = [re.escape(c) + _pattern(below) for c, below in node.items() if c]
    body = rest[0] if len(rest) == 1 else f"(?:{'|'.join(rest)})" if rest else ""
    return f"(?:{body})?" if body and "" in node else body
