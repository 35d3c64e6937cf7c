"""For templates that know of no tools, or write calls in a way that is not known here: tools are described in
the system message, and calls come as Hermes' format has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from outsize.serve.ask import Tool
from outsize.serve.tools import describe
from outsize.serve.tools.formats import hermes
from outsize.text.template import Messages


def writes(template: str) -> bool:
    """Of any template, if no other format speaks up."""
    return True


class Format(hermes.Format):
    name = "generic"

    def prompt(
        self, messages: Messages, tools: Sequence[Tool]
    ) -> tuple[Messages, Mapping[str, object]]:
        told = describe.description(tools, self.example())
        return describe.with_text(self.template, messages, told), {}
