"""Draft statistics: how often draft tokens are right by kind, how long steps take, and what a reply's drafts
have cost so far."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from outsize.draft.mtp import MtpModel
from outsize.draft.step_time import ExpertUnion, StepTimes

LEARN, DRIFT, HAND_ON = 0.1, 0.004, 0.3
TEXT_STEPS = (1, 2, 3, 5, 9, 17)  # tokens that agree, by which matches are told apart
TEXT_PRIOR = (0.12, 0.25, 0.45, 0.65, 0.8, 0.92)
# Probabilities that mask tokens give, by which their predictions are told apart.
SURE_STEPS = (0.0, 0.3, 0.5, 0.7, 0.85, 0.95)
SURE_PRIOR = (0.2, 0.35, 0.55, 0.7, 0.85, 0.97)
MTP_PRIOR = (0.65,)  # of mask tokens' predictions, as long as none has been made
LOSS_SHARE = 0.03  # of a reply's time, that drafts may have lost
LOSS_GRACE = 1.0  # steps without drafts, that they may have lost beside: something has to be tried


def kind_of(value: float, steps: Sequence[float]) -> int:
    """The last step that a value reaches."""
    return bisect_right(steps, value) - 1


class Rates:
    """By kind, the probability that the next draft token is right if those before it were."""

    def __init__(self, prior: Sequence[float]) -> None:
        self._prior, self.now = tuple(prior), list(prior)

    def fresh(self) -> Rates:
        """For a new sequence: it begins where those before it ended, on average."""
        return Rates(self.now)

    def learn(self, other: Rates) -> None:
        """Take over a part of what a sequence that has ended found."""
        self.now = [n + HAND_ON * (o - n) for n, o in zip(self.now, other.now, strict=True)]

    def saw(self, kind: int, good: bool) -> None:
        self.now[kind] += LEARN * (good - self.now[kind])

    def drift(self) -> None:
        """A step without a try: back towards the prior, so that what failed is tried again."""
        self.now = [n + DRIFT * (p - n) for n, p in zip(self.now, self._prior, strict=True)]


class DraftStats:
    """What the sequences of a model share: step times, and the rates at which drafts were right."""

    def __init__(self, mtp: MtpModel | None = None, union: ExpertUnion | None = None) -> None:
        """`union`: of a model with experts."""
        self.step_times, self.mtp = StepTimes(union), mtp
        self.text, self.sure, self.masked = Rates(TEXT_PRIOR), Rates(SURE_PRIOR), Rates(MTP_PRIOR)


class DraftCost:
    """Seconds that drafts have cost one reply, less those that they have brought it: the bound on what a bad
    drafter can lose."""

    def __init__(self) -> None:
        self.lost = self.elapsed = 0.0

    def step(self, took: float, plain: float, worth: float) -> None:
        """A step took so long; one without a draft would have taken `plain`, and the tokens that its draft
        brought would have taken `worth`."""
        self.elapsed += took
        self.lost += took - plain - worth

    def allows(self, plain: float) -> bool:
        """May drafts go on, where a step without them takes `plain` seconds?"""
        return self.lost <= LOSS_SHARE * self.elapsed + LOSS_GRACE * plain
