"""One request, whatever dialect it came in: what every dialect is translated into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from outsize.options import Options
from outsize.text.template import Messages

AUTO, NONE, REQUIRED = "auto", "none", "required"  # of `tool_choice`; else a tool's name
Tool = Mapping[
    str, object
]  # as OpenAI's: {"type": "function", "function": {"name", "parameters", ...}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What the engine is asked for."""

    # Messages for the chat template, a text to continue, or token ids.
    prompt: Messages | str | Sequence[int]
    options: Options
    count: int = 1  # replies, each with a seed of its own
    tools: tuple[Tool, ...] = ()
    tool_choice: str = AUTO  # or none, required, or "=NAME": that tool
    parallel_tools: bool | None = None  # more than one call in a reply, if it was said
    stream: bool = False
    echo: bool = False  # the prompt is part of the reply (completions)
    tells_end: bool = False  # the token that ends a text is among those with log-probabilities

    @property
    def several_calls(self) -> bool:
        """May a reply call more than once? Where nothing is said, if the model is free to make none: a small
        one that must call finds no end."""
        return self.tool_choice == AUTO if self.parallel_tools is None else self.parallel_tools
