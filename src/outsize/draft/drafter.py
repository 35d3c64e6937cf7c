"""The drafter interface: propose draft tokens, then learn which of them were kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from outsize.forward.span import MaskTokens, Out

MOST = 15  # draft tokens: with the last known token, as many as run through kernels of few rows
LEARN = 0.2  # of a step's tokens
SPARE = 64  # slots of keys and values for draft tokens that are not kept


@dataclass(slots=True)
class Company:
    """Who shares a sequence's steps, at the moment."""

    others: int = 0  # sequences
    gained: float = 0.0  # tokens that a step has brought of late, in all
    joining: bool = False  # did the last step run prompts, too? Then the next one likely does
    stretch: float | None = None  # of a shared step by drafts, at most; None: as far as they pay

    def meets(self, others: int, joining: bool) -> None:
        """A step ran this sequence and others, prompts among them (`joining`) or replies alone."""
        if others != self.others:
            self.gained = 0.0
        self.others, self.joining = others, joining

    def saw(self, gained: int) -> None:
        """A step of replies alone brought so many tokens."""
        self.gained += (LEARN if self.gained else 1.0) * (gained - self.gained)

    @property
    def tokens(self) -> float:
        """What a step brings the others: a token each, and what is right of their drafts, whose rows are in
        the step, too."""
        return max(float(self.others), self.gained * self.others / (self.others + 1))


@dataclass(frozen=True, slots=True)
class Draft:
    """Draft tokens, possibly none; and mask tokens to run after some of the step's tokens (number 0 is the
    last known token, 1 the first draft token), whose states the drafter is shown."""

    tokens: tuple[int, ...] = ()
    masks: MaskTokens | None = None


class Drafter(ABC):
    """Proposes what one sequence may say next. May be wrong; may never change the answer."""

    @abstractmethod
    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        """At most `most` draft tokens after `tokens`."""

    def observe(self, draft: Draft, kept: Sequence[int], out: Out) -> None:  # noqa: B027
        """Learn from the last step: its draft, the tokens that it yielded and its outputs."""

    def skip(self) -> None:  # noqa: B027
        """The next step runs without a draft of this drafter's: its tokens are known from elsewhere."""

    def close(self) -> None:  # noqa: B027
        """The sequence has ended."""


class NoDraft(Drafter):
    """Plain decoding: always an empty draft."""

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        return Draft()
