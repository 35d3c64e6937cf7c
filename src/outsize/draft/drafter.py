"""What a drafter is: it proposes draft tokens and is told what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from outsize.forward.span import Masks, Out


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed next tokens, possibly none; and masks to run after some of the step's tokens (number 0 is
    the last known token, 1 the first guess), whose states the drafter is shown."""

    tokens: tuple[int, ...] = ()
    masks: Masks | None = None


class Drafter(Protocol):
    """Guesses what comes next. May be wrong; may never change the answer."""

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        """At most `most` guesses of what follows `tokens`."""
        ...

    def observe(self, draft: Draft, kept: Sequence[int], out: Out) -> None:
        """What became of the last draft: the tokens that the step yielded."""
        ...

    def close(self) -> None:
        """The sequence has ended."""
        ...
