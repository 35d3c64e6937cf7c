"""What a reply is made of as it comes, in any dialect: parts of text, calls of tools, an end."""

from __future__ import annotations

from dataclasses import dataclass

from outsize.engine.reply import Reply
from outsize.sampling.logprobs import TokenLogprob


@dataclass(frozen=True, slots=True)
class Part:
    """More text of a reply: the answer's, or what the model thinks. Never empty, but for `tokens`."""

    choice: int  # which of several replies
    text: str
    reasoning: bool = False
    tokens: tuple[TokenLogprob, ...] = ()  # if they were asked for: the tokens that came with it


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool is called: `index` counts a reply's calls from 0; id and name come once, here."""

    choice: int
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, a text of JSON."""

    choice: int
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class End:
    """One of the replies is complete: why ("stop", "length", "tool_calls"), the stop string that ended it,
    and its account."""

    choice: int
    reason: str
    stop: str | None
    reply: Reply


Event = Part | CallStart | CallArguments | End
