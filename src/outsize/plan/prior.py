"""How often experts are found in memory, where nothing better is known: what our policy reached in
decoding on two recorded traces (docs/results/specmd.md), by the share of experts that has slots."""

from __future__ import annotations

from itertools import pairwise

SHARES = (0.0, 0.01, 0.02, 0.05, 0.10, 0.20, 0.40, 1.0)
LOW = (0.0, 0.137, 0.239, 0.420, 0.601, 0.769, 0.877, 1.0)
HIGH = (0.0, 0.188, 0.292, 0.487, 0.632, 0.788, 0.946, 1.0)


def hit_rates(share: float) -> tuple[float, float]:
    """The lower and the higher of the two, between the measured shares on a straight line."""
    return _between(share, LOW), _between(share, HIGH)


def _between(share: float, rates: tuple[float, ...]) -> float:
    for (x0, y0), (x1, y1) in pairwise(zip(SHARES, rates, strict=True)):
        if share <= x1:
            return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return 1.0
