"""Which format a chat template writes calls of tools in."""

from __future__ import annotations

from outsize.registry import module, names
from outsize.serve.tools import formats
from outsize.serve.tools.format import ToolFormat
from outsize.serve.tools.lark import Knows

GENERIC = "generic"


def format_of(template: str | None, knows: Knows) -> ToolFormat:
    """The format that a template speaks of, or `generic` for one that speaks of none that is known. `knows`
    says of a name whether it is a token of the model's that marks a part of a reply (`Tokens.is_marker`)."""
    for name in names(formats):
        found = module(formats, name, "tool format")
        if name != GENERIC and template and found.writes(template):
            made: ToolFormat = found.Format(template, knows)
            return made
    fallback: ToolFormat = module(formats, GENERIC, "tool format").Format(template or "", knows)
    return fallback
