"""No guesses: plain decoding is speculation with an empty draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed next tokens, possibly none."""

    tokens: tuple[int, ...] = ()


class Drafter(Protocol):
    """Guesses what comes next. May be wrong; may never change the answer."""

    def propose(self, tokens: Sequence[int]) -> Draft: ...


@dataclass(frozen=True, slots=True)
class NoDraft:
    def propose(self, tokens: Sequence[int]) -> Draft:
        return Draft()
