"""Draft what a constraint forces: where there is one choice only, its token is a draft that is always right.
Where there are more, another drafter drafts, and its draft is cut where the constraint would not go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from outsize.draft.drafter import MOST, Draft, Drafter
from outsize.forward.span import Out
from outsize.sampling.constraint import Constraint


class ForcedDraft(Drafter):
    """Forced tokens where there are any, else the draft of another drafter."""

    def __init__(self, constraint: Constraint, inner: Drafter) -> None:
        self._constraint, self._inner = constraint, inner
        self._own = False  # was the last draft of forced tokens?

    def propose(self, tokens: Sequence[int], most: int) -> Draft:
        forced = tuple(self._constraint.forced()[: min(most, MOST)])
        self._own = bool(forced)
        if self._own:
            self._inner.skip()
            return Draft(forced)
        return self._fitting(self._inner.propose(tokens, most))

    def _fitting(self, draft: Draft) -> Draft:
        """What of a draft the constraint allows, and the mask tokens after that."""
        fit = self._constraint.fitting(draft.tokens) if draft.tokens else 0
        if fit == len(draft.tokens):
            return draft
        masks = draft.masks
        if masks is not None:
            anchors = tuple(a for a in masks.anchors if a <= fit)
            masks = replace(masks, anchors=anchors) if anchors else None
        return Draft(draft.tokens[:fit], masks)

    def observe(self, draft: Draft, kept: Sequence[int], out: Out) -> None:
        if not self._own:
            self._inner.observe(draft, kept, out)

    def close(self) -> None:
        self._inner.close()
