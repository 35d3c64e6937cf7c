"""Which tokens a step yields: the target picks at each position; a draft is kept while it agrees.

Exact for any drafter, greedy or sampled: every kept token is the target's own pick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from outsize.draft.none import Draft

Pick = Callable[[Tensor, Sequence[int]], int]  # logits (V,), tokens so far -> the next token


def verify(draft: Draft, logits_KV: Tensor, tokens: Sequence[int], pick: Pick) -> list[int]:
    """One to K new tokens. `pick` is called once for each of them."""
    known, kept = list(tokens), []
    for logits_V, guess in zip(logits_KV, (*draft.tokens, None), strict=True):
        token = pick(logits_V, known)
        known.append(token)
        kept.append(token)
        if token != guess:
            break
    return kept
