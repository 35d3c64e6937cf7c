"""What the formats of calls share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from outsize.serve.ask import AUTO, REQUIRED, Tool
from outsize.serve.tools import describe
from outsize.serve.tools.lark import Function, Knows, functions, names_of
from outsize.serve.tools.parser import CallParser
from outsize.serve.tools.reading import Reading, Source
from outsize.text.template import Messages


class CallFormat(ABC):
    """A format whose calls begin with a mark. A file of `formats/` has one as `Format`, and `writes`, which
    says whether a chat template speaks of it."""

    name: str
    show_tokens: tuple[str, ...]  # control tokens that its text contains; the first begins a call
    bare: tuple[str, ...] = ()  # with these a reply may begin as a call, without a mark

    def __init__(self, template: str, knows: Knows) -> None:
        self.template, self.knows = template, knows

    @property
    def marks(self) -> Sequence[str]:
        """With which a call begins."""
        return self.show_tokens[:1]

    @abstractmethod
    def example(self) -> str:
        """How a call is written, for models whose template does not say."""

    @abstractmethod
    def rules(self, found: Sequence[Function], choice: str, several: bool) -> list[str]:
        """Of a Lark grammar (llguidance's): `start` and others, but for the functions' arguments."""

    def grammar(self, tools: Sequence[Tool], choice: str, parallel: bool) -> str:
        """A Lark grammar (llguidance's) for replies under a `tool_choice`. A tool that is named is called
        once, whatever `parallel` says. Raises OptionError."""
        found = functions(tools, choice)
        rules = self.rules(found, choice, parallel and choice in (AUTO, REQUIRED))
        return "\n".join([*rules, *(f.arguments for f in found)])

    @abstractmethod
    def read(self, source: Source) -> Reading[None]:
        """Read a call, or several, after the mark."""

    def prompt(
        self, messages: Messages, tools: Sequence[Tool]
    ) -> tuple[Messages, Mapping[str, object]]:
        """The messages, and variables for the chat template, with which a model is told of tools."""
        return describe.prompt(self.template, messages, tools, self.example())

    def parser(self, choice: int, tools: Sequence[Tool]) -> CallParser:
        """Of one reply, number `choice`."""
        return CallParser(choice, names_of(tools), self.marks, self.read, self.bare)
