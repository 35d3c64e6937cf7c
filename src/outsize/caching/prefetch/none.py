"""Reads nothing ahead."""

from __future__ import annotations

from collections.abc import Sequence

from outsize.caching.prefetcher import Prefetcher, Seen

AMOUNT, LEAST, MOST = 0.0, 0.0, 0.0
EARLY = False


def _nothing(seen: Seen) -> Sequence[int]:
    return ()


def prefetcher(amount: float, experts: int) -> Prefetcher:
    return _nothing
