"""What a reply must obey: a constraint says which tokens may come next, and follows those that came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Constraint(Protocol):
    """The rule of one reply, followed token by token. Tokens that end a text are allowed where the rule may
    end."""

    @property
    def is_stopped(self) -> bool:
        """Is the reply complete, so that nothing may follow? Or has the rule broken down: `problem`."""
        ...

    @property
    def problem(self) -> str:
        """Why the rule could not be followed to its end; empty: it was, or still is."""
        ...

    def mask(self, logits_V: Tensor) -> Tensor:
        """The logits with those of impossible tokens at minus infinity."""
        ...

    def advance(self, token: int) -> None:
        """Take the token that was picked."""
        ...

    def forced(self) -> Sequence[int]:
        """The tokens that must come next, as far as there is one choice only."""
        ...

    def fitting(self, tokens: Sequence[int]) -> int:
        """How many of these tokens may come next, one after the other."""
        ...
