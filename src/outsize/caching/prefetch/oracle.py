"""What the next layer will ask for, each with probability `amount`, and in the place of those left out
others of that layer: for replay only, since it must be given the future."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from outsize.caching.prefetcher import Prefetcher, Seen

AMOUNT, LEAST, MOST = 1.0, 0.0, 1.0
EARLY = False


def prefetcher(amount: float, experts: int) -> Prefetcher:
    chance = Random(0)

    def oracle(seen: Seen) -> Sequence[int]:
        return [
            i if chance.random() < amount else seen.base + chance.randrange(experts)
            for i in seen.truth
        ]

    return oracle
