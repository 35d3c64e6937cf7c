"""As many as make up `amount` of all that the next layer's gate, asked one layer early, gives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from outsize.caching.prefetcher import Prefetcher, Seen

AMOUNT, LEAST, MOST = 0.7, 0.0, 1.0
EARLY = True


def prefetcher(amount: float, experts: int) -> Prefetcher:
    def quantile(seen: Seen) -> Sequence[int]:
        weights = [w for _, w in seen.early]
        before = [0.0, *accumulate(weights)][: len(weights)]
        enough = amount * sum(weights)
        return [
            seen.base + e
            for (e, _), so_far in zip(seen.early, before, strict=True)
            if so_far < enough
        ]

    return quantile
