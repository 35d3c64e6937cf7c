"""How one sequence's tokens are chosen: a sampler, a drafter, what checks its drafts."""

from __future__ import annotations

from typing import NamedTuple

from outsize.draft.drafter import Company, Drafter
from outsize.draft.forced import ForcedDraft
from outsize.draft.load import Drafting
from outsize.draft.nested import Own
from outsize.draft.verify import Check, verifying
from outsize.options import Options
from outsize.sampling.constraint import Constraint
from outsize.sampling.sample import Sampler


class Chooser(NamedTuple):
    """What `decode` takes."""

    sampler: Sampler
    drafts: tuple[Drafter, Check]


def chooser(
    options: Options,
    drafting: Drafting,
    constraint: Constraint | None = None,
    company: Company | None = None,
    own: Own | None = None,
) -> Chooser:
    """Of one sequence, whose options have a seed; `company`: who shares its steps, `own`: its cache. A
    constraint follows every pick: under one, drafts are checked by picks, also where `verify=rejection` is
    asked for. What it forces is drafted, but not under `draft=none`. The same for log-probabilities, which
    picks note."""
    assert options.seed is not None
    sampler = Sampler(options, options.seed, constraint)
    if constraint is None:
        drawing = (
            sampler if options.logprobs is None else None
        )  # of picks alone there are log-probs
        return Chooser(sampler, drafting.new(drawing, company, own))
    drafter, _ = drafting.new(None, company, own)
    if drafting.spec.kind != "none":
        drafter = ForcedDraft(constraint, drafter)
    return Chooser(sampler, (drafter, verifying(constraint)))
