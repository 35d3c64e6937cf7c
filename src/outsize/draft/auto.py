"""Drafts as long as they pay: of all that could be drafted, what yields most tokens a second by the rates at
which guesses of its kind were accepted and by the pace of steps.

Guesses come from the text (`ngram`) and, where the model has a mask drafter, from masks. Each kind's
acceptance is followed by position (for the text, by how much of it agrees); what is not tried drifts back
to where it began, so that it is tried again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from outsize.draft.masks import MaskModel, block_of
from outsize.draft.ngram import Index, Match
from outsize.draft.none import Draft
from outsize.draft.pace import Pace
from outsize.forward.span import Out

LEARN, DRIFT, HAND_ON = 0.1, 0.004, 0.3
MARGIN, MASKS_MARGIN = 1.03, 1.12  # drafts must promise so much more than none
MASK_PRIOR = (0.7, 0.65, 0.6, 0.55)
TEXT_STEPS = (1, 2, 3, 5, 9, 17)  # tokens that agree, by which matches are told apart
TEXT_PRIOR = (0.12, 0.25, 0.45, 0.65, 0.8, 0.92)
PATIENCE, MOST_PATIENT = 24, 200  # steps until masks that did not pay are tried again
MOST = 15  # guesses: with the last known token, as many as run through kernels of few rows


class Rates:
    """Chances that the next guess is right if those before were, by kind."""

    def __init__(self, prior: Sequence[float]) -> None:
        self._prior, self._now = tuple(prior), list(prior)

    def fresh(self) -> Rates:
        """For a new sequence: it begins where those before it ended, on average."""
        return Rates(self._now)

    def learn(self, other: Rates) -> None:
        """A sequence has ended."""
        pairs = zip(self._now, other._now, strict=True)
        self._now = [n + HAND_ON * (o - n) for n, o in pairs]

    def __getitem__(self, kind: int) -> float:
        return self._now[min(kind, len(self._now) - 1)]

    def saw(self, kind: int, good: bool) -> None:
        kind = min(kind, len(self._now) - 1)
        self._now[kind] += LEARN * (good - self._now[kind])

    def drift(self) -> None:
        """A step without a try."""
        self._now = [n + DRIFT * (p - n) for n, p in zip(self._now, self._prior, strict=True)]


def _kind(agreed: int) -> int:
    """Which of the text's rates holds where so many tokens agree."""
    return sum(agreed >= step for step in TEXT_STEPS) - 1


class Shape(NamedTuple):
    """Masks: how many a block; after every token of a step or the last alone; tokens a second."""

    depth: int
    quadratic: bool
    value: float


class Habits:
    """What a model's sequences hand on: how fast steps are, and which guesses were right."""

    def __init__(self, masks: MaskModel | None = None) -> None:
        self.pace, self.masks, self.text = Pace(), masks, Rates(TEXT_PRIOR)
        count = masks.k if masks else 1
        self.foresight = Rates([*MASK_PRIOR, *[MASK_PRIOR[-1]] * count][:count])


class AutoDraft:
    """One sequence's drafter."""

    def __init__(self, habits: Habits, others: int = 0) -> None:
        """`others`: sequences that share the steps."""
        self._habits, self._others = habits, others
        self._pace, self._masks = habits.pace, habits.masks
        self._index, self._guesses = Index(), tuple[int, ...]()
        self._text, self._foresight = habits.text.fresh(), habits.foresight.fresh()
        self._idle, self._patience = 0, PATIENCE  # steps without masks, and how many to let pass
        self._agreed, self._own = 0, 1  # of the last draft: tokens that agree (0: by masks), rows

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        self._index.extend(tokens)
        most = min(most, MOST)
        plain, shape = self._value(1.0, 1), self._shape()
        match = self._index.match(most)
        pays = shape.value > MASKS_MARGIN * plain
        depth = shape.depth if pays else 0
        count, by_text = self._length(match, depth)
        if count and by_text > MARGIN * max(plain, shape.value if pays else 0.0):
            anchors = tuple(dict.fromkeys((0, count)))
            return self._drafted(match.tokens[:count], anchors, depth, match.length)
        if shape.depth and (pays or self._probing()):
            guesses = self._guesses[: min(shape.depth, most)]
            anchors = tuple(range(len(guesses) + 1)) if shape.quadratic else (len(guesses),)
            return self._drafted(guesses, anchors, shape.depth, 0)
        return self._drafted((), (), 0, 0)

    def _probing(self) -> bool:
        """Is it time to see whether masks would pay by now? Two steps: one makes guesses, the next uses
        them; ever more rarely."""
        self._idle += 1
        if self._idle <= self._patience:
            return False
        if self._idle >= self._patience + 2:
            self._idle, self._patience = 0, min(2 * self._patience, MOST_PATIENT)
        return True

    def _drafted(
        self, tokens: tuple[int, ...], anchors: tuple[int, ...], depth: int, agreed: int
    ) -> Draft:
        masks = self._masks.masks(anchors, depth) if self._masks and depth and anchors else None
        self._agreed = agreed
        self._own = 1 + len(tokens) + (len(anchors) * depth if masks else 0)
        return Draft(tokens, masks)

    def _value(self, tokens: float, rows: int, masked: bool = False) -> float:
        """Tokens a second of the whole step, the other sequences' included."""
        return (tokens + self._others) / self._seconds(rows, masked)

    def _seconds(self, rows: int, masked: bool) -> float:
        others = max(0, self._pace.rows - self._own) if self._others else 0
        return self._pace.seconds(rows + others, masked)

    def _shape(self) -> Shape:
        """How many masks pay most in the long run, after which tokens, and what they promise."""
        best, expected, chance = Shape(0, True, 0.0), 1.0, 1.0
        for depth in range(1, (self._masks.k if self._masks else 0) + 1):
            chance *= self._foresight[depth - 1]
            expected += chance
            value = self._value(expected, (depth + 1) ** 2, True)
            best = max(best, Shape(depth, True, value), key=lambda s: s.value)
            # One guess wrong, and the next step has none: a step of one token, with new masks.
            failed = 1 - chance
            tokens = expected + failed + self._others * (1 + failed)
            seconds = self._seconds(1 + 2 * depth, True) + failed * self._seconds(1 + depth, True)
            best = max(best, Shape(depth, False, tokens / seconds), key=lambda s: s.value)
        return best

    def _length(self, match: Match, depth: int) -> tuple[int, float]:
        """How much of a match to take, and what it promises."""
        best, promise, expected, chance = 0, 0.0, 1.0, 1.0
        for count in range(1, len(match.tokens) + 1):
            chance *= self._text[_kind(match.length + count - 1)]
            expected += chance
            value = self._value(expected, 1 + count + 2 * depth, depth > 0)
            if value > promise:
                best, promise = count, value
        return best, promise

    def observe(self, draft: Draft, kept: Sequence[int], out: Out) -> None:
        accepted = len(kept) - 1
        tried = min(accepted + 1, len(draft.tokens))
        for place in range(tried):
            good = place < accepted
            if self._agreed:
                self._text.saw(_kind(self._agreed + place), good)
            else:
                self._foresight.saw(place, good)
        if not tried:
            self._text.drift()
            self._foresight.drift()
        states = block_of(draft, accepted, out)
        self._guesses = (
            () if states is None or self._masks is None else self._masks.guess(states, kept[-1])
        )

    def close(self) -> None:
        self._habits.text.learn(self._text)
        self._habits.foresight.learn(self._foresight)
