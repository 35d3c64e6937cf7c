"""Prompt lookup: what followed the last time that the text ended like this (arXiv 2311.08252 and 2304.04487
draw drafts from a text likewise).

Every run of three tokens, and of two and one, is chained to the place before where it ended, as compressors
chain theirs (LZ77). Of the longest known run's places the latest LOOKS are compared, and the one whose past
agrees furthest with ours is continued: the longest match first, the latest of equals. The runs of at most
MOST_TOKENS tokens are remembered.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from outsize.draft.drafter import Draft
from outsize.forward.span import Out

RUN, FURTHEST = 3, 32
LOOKS = 512  # places that are compared, a tenth of a millisecond
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
        self._latest: list[dict[tuple[int, ...], int]] = [
            {} for _ in range(RUN)
        ]  # by size, less one
        self._before = [
            array("q") for _ in range(RUN)
        ]  # of each place: where its run ended before; 0: nowhere

    def extend(self, tokens: Sequence[int]) -> None:
        """Take the text as it is now; it has only grown."""
        for end in range(len(self._tokens), len(tokens)):
            if end % MOST_TOKENS == 0:
                for latest in self._latest:
                    latest.clear()
            self._tokens.append(tokens[end])
            for size in range(1, RUN + 1):
                latest, key = self._latest[size - 1], tuple(self._tokens[end + 1 - size :])
                known = size <= end + 1
                self._before[size - 1].append(latest.get(key, 0) if known else 0)
                if known:
                    latest[key] = end + 1

    def match(self, most: int) -> Match:
        """The continuation of the place that agrees furthest with the text's end."""
        text = self._tokens
        best, furthest = self._furthest()
        if not furthest:
            return Match()
        guesses = text[best : best + most]
        period = len(text) - best
        while len(guesses) < most:  # the text runs into itself: it repeats
            guesses.append(guesses[len(guesses) - period])
        return Match(tuple(guesses), furthest)

    def _furthest(self) -> tuple[int, int]:
        """The place, and how many tokens agree; 0: none does."""
        text = self._tokens
        for size in range(min(RUN, len(text)), 0, -1):
            before, best, furthest = self._before[size - 1], 0, 0
            place = before[-1]
            for _ in range(LOOKS):
                if not place or furthest == FURTHEST:
                    break
                if place > furthest and text[place - 1 - furthest] == text[-1 - furthest]:
                    length = self._agreement(place)
                    if length > furthest:
                        best, furthest = place, length
                place = before[place - 1]
            if furthest:
                return best, furthest
        return 0, 0

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
