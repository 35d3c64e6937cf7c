"""Prompt lookup: draft what followed the last time that the text ended like this (arXiv 2311.08252 and
2304.04487 draw drafts from a text likewise).

Every run of three tokens, and of two and one, is chained to the place before where it ended, as compressors
chain theirs (LZ77). Of the longest known run's places the latest LOOKS are compared, and the one whose past
agrees furthest with ours is continued: the longest match first, the latest of equals. The runs of at most
MOST_TOKENS tokens are remembered.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from outsize.draft.drafter import Draft, Drafter

RUN, FURTHEST = 3, 32
LOOKS = 512  # places that are compared, a tenth of a millisecond
MOST_TOKENS = 1 << 16  # remembered; a longer text forgets its past


@dataclass(frozen=True, slots=True)
class Match:
    """Draft tokens, and how many tokens before them agree."""

    tokens: tuple[int, ...] = ()
    length: int = 0


class Index:
    """A text's runs of tokens, and where they ended."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        # By a run's size, less one: where it ended last; and of each place, where its run ended before.
        self._latest = [dict[tuple[int, ...], int]() for _ in range(RUN)]
        self._before = [array("q") for _ in range(RUN)]  # 0: nowhere

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
        found, period = text[best : best + most], len(text) - best
        while len(found) < most:  # the text runs into itself: it repeats
            found.append(found[len(found) - period])
        return Match(tuple(found), furthest)

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


class NgramDraft(Drafter):
    """Always drafts the best match, `k` tokens of it."""

    def __init__(self, k: int) -> None:
        self._k, self._index = k, Index()

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        self._index.extend(tokens)
        return Draft(self._index.match(min(self._k, most)).tokens)
