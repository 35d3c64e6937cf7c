"""Checks a draft against the model: which tokens a step yields (speculative decoding).

`verify`: the target picks at each position; a draft is kept while it agrees. Exact for any drafter, greedy or
sampled: every kept token is the target's own pick, so a seed's answer is the same with drafts and without.
`reject`: where the drafter drew its tokens from known distributions, each is kept with probability
min(1, p / q), and the first that is not is replaced by a draw from what p has more than q (speculative
sampling, arXiv 2211.17192, algorithm 1).
Exact in distribution; more is kept, but a seed's answer is another one than without drafts.

Shapes: K positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from outsize.draft.drafter import Draft
from outsize.sampling.constraint import Constraint
from outsize.sampling.probs import Probs
from outsize.sampling.sample import Sampler

Pick = Callable[[Tensor, Sequence[int]], int]  # logits (V,), tokens so far -> the next token
Check = Callable[[Draft, Tensor, Sequence[int], Pick], list[int]]  # with logits (K, V), as `verify`


def verify(draft: Draft, logits_KV: Tensor, tokens: Sequence[int], pick: Pick) -> list[int]:
    """One to K new tokens. `pick` is called once for each of them."""
    return _agreed(draft, logits_KV, tokens, pick, None)


def verifying(constraint: Constraint) -> Check:
    """`verify`, to the token with which a constraint is complete."""
    return partial(_agreed, constraint=constraint)


def _agreed(
    draft: Draft,
    logits_KV: Tensor,
    tokens: Sequence[int],
    pick: Pick,
    constraint: Constraint | None,
) -> list[int]:
    known, kept = list(tokens), []
    for logits_V, drafted in zip(logits_KV, (*draft.tokens, None), strict=True):
        token = pick(logits_V, known)
        known.append(token)
        kept.append(token)
        if token != drafted or (constraint is not None and constraint.is_stopped):
            break
    return kept


def rejecting(sampler: Sampler, drawn_from: Callable[[], Sequence[Probs]]) -> Check:
    """`reject`, for a drafter that knows what its last draft was drawn from."""

    def check(draft: Draft, logits_KV: Tensor, tokens: Sequence[int], pick: Pick) -> list[int]:
        return reject(draft, drawn_from(), logits_KV, tokens, sampler)

    return check


def reject(
    draft: Draft,
    drawn_from: Sequence[Probs],
    logits_KV: Tensor,
    tokens: Sequence[int],
    sampler: Sampler,
) -> list[int]:
    """One to K new tokens."""
    known, random = list(tokens), sampler.random
    for logits_V, drafted, theirs in zip(logits_KV, draft.tokens, drawn_from, strict=False):
        ours = sampler.probs(logits_V, known)
        if random.random() * theirs.of(drafted) >= ours.of(drafted):
            return [*known[len(tokens) :], _more(ours, theirs).draw(random)]
        known.append(drafted)
    last = sampler.probs(logits_KV[len(known) - len(tokens)], known)
    return [*known[len(tokens) :], last.draw(random)]


def _more(ours: Probs, theirs: Probs) -> Probs:
    """What is likelier by `ours` than by `theirs`, by how much."""
    dense = np.zeros(1 + max(int(ours.ids.max()), int(theirs.ids.max())))
    dense[theirs.ids] = theirs.weight / theirs.weight.sum()
    left = np.maximum(ours.weight / ours.weight.sum() - dense[ours.ids], 0.0)
    return Probs(ours.ids, left) if left.any() else ours  # equal, but for rounding
