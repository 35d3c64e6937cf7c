"""Prompt lookup: what followed the last time that the text ended like this (arXiv 2311.08252 and 2304.04487
draw drafts from a text likewise).

Every run of three tokens, and of two and one, is remembered with the last places where it ended. Among those
of the longest known run, the place whose past agrees furthest with ours is continued: the longest match
first, the latest of equals. Memory is bounded by the number of places kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outsize.draft.none import Draft
from outsize.forward.span import Out

RUN, PLACES, FURTHEST = 3, 4, 32
MOST_TOKENS = 1 << 16  # remembered; a longer text forgets its past


@dataclass(frozen=True, slots=True)
class Match:
    """Guesses, and how many tokens before them agree."""

    tokens: tuple[int, ...] = ()
    length: int = 0


class Index:
    """A text's runs of tokens, and where they ended."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Take the text as it is now; it has only grown."""
        for end in range(len(self._tokens), len(tokens)):
            if end % MOST_TOKENS == 0:
                self._places.clear()
            self._tokens.append(tokens[end])
            for size in range(1, min(RUN, end + 1) + 1):
                key = tuple(self._tokens[end + 1 - size :])
                places = self._places.setdefault(key, [])
                places.append(end + 1)
                if len(places) > PLACES + 1:
                    del places[0]

    def match(self, most: int) -> Match:
        """The continuation of the place that agrees furthest with the text's end."""
        text = self._tokens
        best, furthest = 0, 0
        for size in range(min(RUN, len(text)), 0, -1):
            for place in reversed(self._places.get(tuple(text[-size:]), ())):
                if place < len(text) and (length := self._agreement(place)) > furthest:
                    best, furthest = place, length
            if furthest:
                break
        if not furthest:
            return Match()
        guesses = text[best : best + most]
        period = len(text) - best
        while len(guesses) < most:  # the text runs into itself: it repeats
            guesses.append(guesses[len(guesses) - period])
        return Match(tuple(guesses), furthest)

    def _agreement(self, place: int) -> int:
        """Tokens before `place` that are also the text's last."""
        text, count = self._tokens, 0
        while count < min(place, FURTHEST) and text[place - 1 - count] == text[-1 - count]:
            count += 1
        return count


class NgramDraft:
    """Always the best match, as long as `k`."""

    def __init__(self, k: int) -> None:
        self._k, self._index = k, Index()

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        self._index.extend(tokens)
        return Draft(self._index.match(min(self._k, most)).tokens)

    def observe(self, draft: Draft, kept: Sequence[int], out: Out) -> None:
        """Nothing to learn."""

    def close(self) -> None:
        """Nothing to end."""
