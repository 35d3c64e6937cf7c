"""How a model writes calls of tools: one small file a format (`formats/`), found by its chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from outsize.serve.ask import Tool
from outsize.serve.events import CallArguments, CallStart, Part
from outsize.text.template import Messages


class Parser(Protocol):
    """Splits a reply's text into text and calls, as it comes. What cannot be read as a call becomes text."""

    def push(self, text: str) -> Iterator[Part | CallStart | CallArguments]:
        """What is certain by now; of a call's arguments at most one piece."""
        ...

    def finish(self) -> Iterator[Part | CallStart | CallArguments]:
        """What was held back, at the end."""
        ...


class ToolFormat(Protocol):
    """One way of writing calls."""

    name: str
    show_tokens: tuple[str, ...]  # control tokens that its text contains

    def prompt(
        self, messages: Messages, tools: Sequence[Tool]
    ) -> tuple[Messages, Mapping[str, object]]:
        """The messages, and variables for the chat template, with which a model is told of tools."""
        ...

    def grammar(self, tools: Sequence[Tool], choice: str, parallel: bool) -> str | None:
        """A Lark grammar (llguidance's) for replies under a `tool_choice`; None: anything goes. Raises
        OptionError."""
        ...

    def parser(self, choice: int, tools: Sequence[Tool]) -> Parser:
        """Of one reply, number `choice`."""
        ...
