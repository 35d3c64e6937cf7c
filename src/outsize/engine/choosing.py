"""How one sequence's tokens are chosen: a sampler, a drafter, what checks its drafts."""

from __future__ import annotations

from typing import NamedTuple

from outsize.draft.drafter import Drafter
from outsize.draft.forced import ForcedDraft
from outsize.draft.load import Drafting
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
    seed: int,
    drafting: Drafting,
    constraint: Constraint | None = None,
    others: int = 0,
) -> Chooser:
    """Of one sequence; `others` share its steps. A constraint follows every pick: under one, drafts are
    checked by picks, also where `verify=rejection` is asked for. What it forces is drafted, but not under
    `draft=none`."""
    sampler = Sampler(options, seed, constraint)
    if constraint is None:
        return Chooser(sampler, drafting.new(sampler, others))
    drafter, _ = drafting.new(None, others)
    if drafting.spec.kind != "none":
        drafter = ForcedDraft(constraint, drafter)
    return Chooser(sampler, (drafter, verifying(constraint)))
