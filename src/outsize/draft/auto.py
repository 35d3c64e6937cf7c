"""Drafts as long as they pay: of all that could be drafted, what yields most tokens a second by the rates at
which guesses of its kind were right and by the pace of steps.

Guesses come from the text (`ngram`) and, where the model has a mask drafter, from masks. How often they are
right is followed by kind: of the text's by how many tokens agree, of the masks' by how sure they are. Masks
go after those tokens of a step with which it may well end, so that few rows do nearly what masks after every
token would. What is not tried drifts back to where it began, so that it is tried again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from outsize.draft.drafter import Draft
from outsize.draft.loss import Loss
from outsize.draft.mtp import Guess, MtpModel, block_of
from outsize.draft.ngram import Index
from outsize.draft.step_time import StepTimes
from outsize.draft.union import Union
from outsize.forward.span import Out

LEARN, DRIFT, HAND_ON = 0.1, 0.004, 0.3
MARGIN = 1.01  # drafts must promise so much more than none
TEXT_STEPS = (1, 2, 3, 5, 9, 17)  # tokens that agree, by which matches are told apart
TEXT_PRIOR = (0.12, 0.25, 0.45, 0.65, 0.8, 0.92)
# Probs that masks give, by which guesses are told apart.
SURE_STEPS = (0.0, 0.3, 0.5, 0.7, 0.85, 0.95)
SURE_PRIOR = (0.2, 0.35, 0.55, 0.7, 0.85, 0.97)
MASK_PRIOR = (0.65,)  # of masks' guesses, as long as none has been made
AHEAD = 0.6  # what counts of the tokens that guesses may bring the next step: they take rows there
PATIENCE, MOST_PATIENT = 24, 200  # steps until masks that did not pay are tried again
MOST = 15  # guesses: with the last known token, as many as run through kernels of few rows


class Rates:
    """Probs that the next guess is right if those before were, by kind."""

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
        return self._now[kind]

    def saw(self, kind: int, good: bool) -> None:
        self._now[kind] += LEARN * (good - self._now[kind])

    def drift(self) -> None:
        """A step without a try."""
        self._now = [n + DRIFT * (p - n) for n, p in zip(self._now, self._prior, strict=True)]


def kind_of(value: float, steps: Sequence[float]) -> int:
    """The last step that a value reaches."""
    return bisect_right(steps, value) - 1


class Plan(NamedTuple):
    """What a step could run."""

    tokens: tuple[int, ...] = ()
    kinds: tuple[int, ...] = ()  # of these guesses
    anchors: tuple[int, ...] = ()
    value: float = 0.0  # tokens a second, of all sequences that share the step


class DraftStats:
    """What a model's sequences hand on: how fast steps are, and which guesses were right."""

    def __init__(self, masks: MtpModel | None = None, union: Union | None = None) -> None:
        """`union`: of a model with experts."""
        self.pace, self.masks = StepTimes(union), masks
        self.text, self.sure, self.masked = Rates(TEXT_PRIOR), Rates(SURE_PRIOR), Rates(MASK_PRIOR)


class AutoDraft:
    """One sequence's drafter."""

    def __init__(self, draft_stats: DraftStats, others: int = 0) -> None:
        """`others`: sequences that share the steps."""
        self._habits, self._others = draft_stats, others
        self._pace, self._masks = draft_stats.pace, draft_stats.masks
        self._index, self._guesses = Index(), tuple[Guess, ...]()
        self._text, self._sure = draft_stats.text.fresh(), draft_stats.sure.fresh()
        self._masked = draft_stats.masked.fresh()  # of masks' guesses, however sure
        self._idle, self._patience = 0, PATIENCE  # steps without masks, and how many to let pass
        # Of the last draft: kinds of its guesses, whether the text's, rows.
        self._kinds, self._by_text, self._own = tuple[int, ...](), False, 1
        self._loss, self._right = (
            Loss(),
            -1,
        )  # guesses of the last step that were right; -1: it is accounted

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        self._index.extend(tokens)
        self._account()
        if not self._loss.allows(self._seconds(1, False)):
            return self._drafted(Plan(), 0, False)
        match, own = self._index.match(min(most, MOST)), self._guesses[:most]
        agreed = range(match.length, match.length + len(match.tokens))
        text_kinds = tuple(kind_of(n, TEXT_STEPS) for n in agreed)
        own_tokens = tuple(guess.token for guess in own)
        own_kinds = tuple(kind_of(guess.chance, SURE_STEPS) for guess in own)
        depth, ahead = self._block()
        by_text = self._plan(match.tokens, text_kinds, self._text, depth, ahead)
        by_masks = self._plan(own_tokens, own_kinds, self._sure, depth, ahead)
        best = max(by_text, by_masks, key=lambda plan: plan.value)
        if best.value > MARGIN * (1 + self._others) / self._seconds(1, False):
            return self._drafted(best, depth, best is by_text)
        if self._masks and self._probing():
            return self._drafted(Plan(own_tokens, own_kinds, (len(own),)), 1, False)
        return self._drafted(Plan(), 0, False)

    def _account(self) -> None:
        """Of the last step, whose time is known by now."""
        if self._right >= 0 and self._pace.last_s:
            plain = self._seconds(1, False)
            worth = self._right * plain / (1 + self._others)
            self._loss.step(self._pace.last_s if self._own > 1 else plain, plain, worth)
        self._right = -1

    def _probing(self) -> bool:
        """Is it time to see whether masks would pay by now? Two steps: one makes a guess, the next uses
        it; ever more rarely."""
        self._idle += 1
        if self._idle <= self._patience:
            return False
        if self._idle >= self._patience + 2:
            self._idle, self._patience = 0, min(2 * self._patience, MOST_PATIENT)
        return True

    def _drafted(self, plan: Plan, depth: int, by_text: bool) -> Draft:
        masks = self._masks.masks(plan.anchors, depth) if self._masks and plan.anchors else None
        self._kinds, self._by_text = plan.kinds, by_text
        self._own = 1 + len(plan.tokens) + len(plan.anchors) * depth
        return Draft(plan.tokens, masks)

    def _seconds(self, rows: int, masked: bool) -> float:
        """Of the whole step, the other sequences' rows included."""
        others = max(0, self._pace.rows - self._own) if self._others else 0
        return self._pace.seconds(rows + others, masked)

    def _block(self) -> tuple[int, float]:
        """How many masks a block should have, and what their guesses count in tokens of the next step. None
        where they do not pay after a step of one token: after a better one they would pay less."""
        best, most, ahead = (0, 0.0), (1 + self._others) / self._seconds(1, False), 0.0
        for depth in range(1, (self._masks.k if self._masks else 0) + 1):
            ahead += AHEAD * self._masked[0] ** depth
            value = (1 + ahead + self._others) / self._seconds(1 + depth, True)
            if value > most:
                best, most = (depth, ahead), value
        return best

    def _plan(
        self, tokens: Sequence[int], kinds: tuple[int, ...], rates: Rates, depth: int, ahead: float
    ) -> Plan:
        """As many of these guesses as pay."""
        best, expected, reached, ends = Plan(), 0.0, 1.0, list[float]()
        for count in range(len(tokens) + 1):
            expected += reached
            anchors, value = self._anchors([*ends, reached], expected, depth, ahead)
            if value > best.value:
                best = Plan(tuple(tokens[:count]), kinds[:count], anchors, value)
            if count < len(tokens):
                ends.append(reached * (1 - rates[kinds[count]]))
                reached *= rates[kinds[count]]
        return best

    def _anchors(
        self, ends: Sequence[float], expected: float, depth: int, ahead: float
    ) -> tuple[tuple[int, ...], float]:
        """Where to put masks in a step that yields so many tokens and ends with each of its own by these
        chances; and the value of the step."""
        tokens = expected + self._others
        best, most = tuple[int, ...](), tokens / self._seconds(len(ends), False)
        likeliest = sorted(range(len(ends)), key=lambda place: -ends[place]) if depth else []
        for count, place in enumerate(likeliest, 1):
            tokens += ends[place] * ahead
            value = tokens / self._seconds(len(ends) + count * depth, True)
            if value > most:
                best, most = tuple(sorted(likeliest[:count])), value
            elif best:
                break
        return best, most

    def observe(self, draft: Draft, kept: Sequence[int], out: Out) -> None:
        accepted = self._right = len(kept) - 1
        tried = self._kinds[: accepted + 1]
        for place, kind in enumerate(tried):
            good = place < accepted
            (self._text if self._by_text else self._sure).saw(kind, good)
            if not self._by_text:
                self._masked.saw(0, good)
        if not tried:
            for rates in (self._text, self._sure, self._masked):
                rates.drift()
        states = block_of(draft, accepted, out)
        self._guesses = (
            () if states is None or self._masks is None else self._masks.guess(states, kept[-1])
        )

    def close(self) -> None:
        self._habits.text.learn(self._text)
        self._habits.sure.learn(self._sure)
        self._habits.masked.learn(self._masked)
