"""How a model writes calls of tools: one small file a format, found by its chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from outsize.serve.ask import Tool
from outsize.serve.events import CallArguments, CallStart, Part


class Parser(Protocol):
    """Splits a reply's text into text and calls, as it comes. What cannot be read as a call becomes text."""

    def push(self, text: str) -> Iterator[Part | CallStart | CallArguments]:
        """What is certain by now."""
        ...

    def finish(self) -> Iterator[Part | CallStart | CallArguments]:
        """What was held back, at the end."""
        ...


class ToolFormat(Protocol):
    """One way of writing calls."""

    name: str
    show_tokens: tuple[str, ...]  # control tokens that its text contains

    def writes(self, template: str) -> bool:
        """Does a chat template speak of this format?"""
        ...

    def grammar(self, tools: Sequence[Tool], choice: str, parallel: bool) -> str | None:
        """A Lark grammar (llguidance's) for replies under a `tool_choice`; None: anything goes."""
        ...

    def parser(self, choice: int, tools: Sequence[Tool]) -> Parser:
        """Of one reply."""
        ...
