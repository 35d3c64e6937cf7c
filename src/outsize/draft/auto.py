"""`--draft auto`: draft only while it pays. Each step runs the draft that promises most tokens a second, by
the rates at which drafts of its kind were right and by the step-time model.

Drafts come from the text (`ngram`) and, where the model has one, from its mask tokens (`mtp`). How often they
are right is followed by kind: of the text's by how many tokens agree, of the mask tokens' by how sure they
are. Mask tokens go after those tokens of a step with which it may well end, so that few rows do nearly what
mask tokens after every token would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from outsize.draft.drafter import MOST, Company, Draft, Drafter
from outsize.draft.mtp import Prediction, block_of
from outsize.draft.ngram import Index
from outsize.draft.stats import SURE_STEPS, TEXT_STEPS, DraftCost, DraftStats, Rates, kind_of
from outsize.forward.span import Out

MARGIN = 1.01  # drafts must promise so much more than none
CROWD = 4  # others: from eight rows on, kernels are bound by computing
AHEAD = 0.6  # what counts of the tokens that the next step may get: they take rows there
PATIENCE, MOST_PATIENT = 24, 200  # steps until mask tokens that did not pay are tried again


class Plan(NamedTuple):
    """What a step could run."""

    tokens: tuple[int, ...] = ()
    kinds: tuple[int, ...] = ()  # of these tokens
    anchors: tuple[int, ...] = ()
    value: float = 0.0  # tokens a second, of all sequences that share the step


class AutoDraft(Drafter):
    """One sequence's drafter: text and mask tokens, as much as pays."""

    def __init__(self, draft_stats: DraftStats, company: Company | None = None) -> None:
        """`company`: who shares the steps."""
        self._stats, self._company = draft_stats, company or Company()
        self._step_times, self._mtp = draft_stats.step_times, draft_stats.mtp
        self._index, self._ready = Index(), tuple[Prediction, ...]()
        self._text, self._sure = draft_stats.text.fresh(), draft_stats.sure.fresh()
        self._masked = draft_stats.masked.fresh()  # of mask tokens' predictions, however sure
        # Steps without mask tokens, and how many to let pass.
        self._idle, self._patience = 0, PATIENCE
        # Of the last draft: kinds of its tokens, whether the text's, rows.
        self._kinds, self._by_text, self._own = tuple[int, ...](), False, 1
        # Seconds it cost, and tokens of it that were right; -1: that is accounted.
        self._cost, self._right = DraftCost(), -1

    @property
    def _others(self) -> float:
        """Tokens that a step brings the others."""
        return self._company.tokens

    @property
    def _is_crowded(self) -> bool:
        """Do so many share a step that each further row costs what it brings? Then rows of mask tokens, which
        bring none themselves, cost more; but not where the step waits for the disk."""
        return self._company.others >= CROWD and not self._step_times.reads

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        self._index.extend(tokens)
        self._account()
        if not self._cost.allows(self._seconds(1, False)):
            return self._drafted(Plan(), 0, False)
        most = min(most, self._fair())
        match, own = self._index.match(min(most, MOST)), self._ready[:most]
        agreed = range(match.length, match.length + len(match.tokens))
        text_kinds = tuple(kind_of(n, TEXT_STEPS) for n in agreed)
        own_tokens = tuple(p.token for p in own)
        own_kinds = tuple(kind_of(p.prob, SURE_STEPS) for p in own)
        depth, ahead = self._block()
        by_text = self._plan(match.tokens, text_kinds, self._text, depth, ahead)
        by_mtp = self._plan(own_tokens, own_kinds, self._sure, depth, ahead)
        best = max(by_text, by_mtp, key=lambda plan: plan.value)
        if best.value > MARGIN * (1 + self._others) / self._seconds(1, False):
            return self._drafted(best, depth, best is by_text)
        if self._mtp and not self._is_crowded and self._probing():
            return self._drafted(Plan(own_tokens, own_kinds, (len(own),)), 1, False)
        return self._drafted(Plan(), 0, False)

    def _fair(self) -> int:
        """Draft tokens with which a shared step takes at most `stretch` times as long as one without drafts,
        if all who share it have as many. Where it runs prompts as well, reading hides no rows: all together
        draft as many there as one alone may."""
        share, stretch = self._company.others + 1, self._company.stretch
        if share == 1 or stretch is None:
            return MOST
        if self._company.joining:
            return MOST // share
        most = stretch * self._step_times.seconds(share)
        counts = range(MOST, 0, -1)
        return next((n for n in counts if self._step_times.seconds(share * (1 + n)) <= most), 0)

    def _account(self) -> None:
        """Enter the last step's cost: its time is known by now."""
        if self._right >= 0 and self._step_times.last_s:
            plain = self._seconds(1, False)
            worth = self._right * plain / (1 + self._others)
            self._cost.step(self._step_times.last_s if self._own > 1 else plain, plain, worth)
        self._right = -1

    def _probing(self) -> bool:
        """Is it time to see whether mask tokens would pay by now? Two steps: one predicts, the next
        drafts that; ever more rarely."""
        self._idle += 1
        if self._idle <= self._patience:
            return False
        if self._idle >= self._patience + 2:
            self._idle, self._patience = 0, min(2 * self._patience, MOST_PATIENT)
        return True

    def _drafted(self, plan: Plan, depth: int, by_text: bool) -> Draft:
        masks = self._mtp.masks(plan.anchors, depth) if self._mtp and plan.anchors else None
        self._kinds, self._by_text = plan.kinds, by_text
        self._own = 1 + len(plan.tokens) + len(plan.anchors) * depth
        return Draft(plan.tokens, masks)

    def _seconds(self, rows: int, masked: bool) -> float:
        """Expected time of the whole step, the other sequences' rows included."""
        others = max(0, self._step_times.rows - self._own) if self._others else 0
        return self._step_times.seconds(rows + others, masked)

    def _block(self) -> tuple[int, float]:
        """How many mask tokens a block should have, and what they count in tokens of the next step. None
        where they do not pay after a step of one token: after a better one they would pay less."""
        if self._is_crowded:
            return 0, 0.0
        best, most, ahead = (0, 0.0), (1 + self._others) / self._seconds(1, False), 0.0
        for depth in range(1, (self._mtp.k if self._mtp else 0) + 1):
            ahead += AHEAD * self._masked.now[0] ** depth
            value = (1 + ahead + self._others) / self._seconds(1 + depth, True)
            if value > most:
                best, most = (depth, ahead), value
        return best

    def _plan(
        self, tokens: Sequence[int], kinds: tuple[int, ...], rates: Rates, depth: int, ahead: float
    ) -> Plan:
        """The best step with some of these draft tokens: as many as pay."""
        best, expected, reached, ends = Plan(), 0.0, 1.0, list[float]()
        for count in range(len(tokens) + 1):
            expected += reached
            anchors, value = self._anchors([*ends, reached], expected, depth, ahead)
            if value > best.value:
                best = Plan(tuple(tokens[:count]), kinds[:count], anchors, value)
            if count < len(tokens):
                ends.append(reached * (1 - rates.now[kinds[count]]))
                reached *= rates.now[kinds[count]]
        return best

    def _anchors(
        self, ends: Sequence[float], expected: float, depth: int, ahead: float
    ) -> tuple[tuple[int, ...], float]:
        """Where to put mask tokens in a step that is expected to yield so many tokens and ends with each of
        its own with these probabilities; and the value of the step."""
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
        self._ready = (
            self._mtp.predict(states, kept[-1]) if self._mtp and states is not None else ()
        )

    def skip(self) -> None:
        self._account()
        self._ready = ()

    def close(self) -> None:
        """Hand on what this sequence found."""
        self._stats.text.learn(self._text)
        self._stats.sure.learn(self._sure)
        self._stats.masked.learn(self._masked)
