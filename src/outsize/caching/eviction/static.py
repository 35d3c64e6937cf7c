"""The most used of a profile are pinned; all others pass through the few slots that are left."""

from __future__ import annotations

from outsize.caching.eviction.pin_and_ring import PinAndRing
from outsize.caching.policy import Hints, Policy

RING_SHARE, LEAST_RING = 0.1, 8  # of the slots


def policy(capacity: int, hints: Hints) -> Policy:
    ring = min(capacity, max(LEAST_RING, int(capacity * RING_SHARE)))
    return PinAndRing(capacity, hints.ranked[: capacity - ring])
