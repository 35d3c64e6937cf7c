"""At which error, or at which threshold, a share of the feed-forwards is executed.

Shapes: L layers, N tokens, M widths.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from outsize.adapt.nested.prefixes import labels
from outsize.model.width import chosen

BISECTIONS = 20


def level_at(error_LNM: Tensor, share: float, shares_M: Tensor) -> float:
    """The error at which labels execute a share; of widths with shares that rise to 1."""
    low, high = float(error_LNM.min()), float(error_LNM.max())

    def above(level: float) -> bool:
        return float(shares_M[labels(error_LNM, level)].mean()) <= share

    return _bisected(low, high, above)


def threshold_at(z_LNM: Tensor, share: float, shares_M: Tensor) -> float:
    """The threshold at which routers with these logits execute a share."""

    def above(threshold: float) -> bool:
        return float(shares_M[chosen(z_LNM, threshold)].mean()) >= share

    return _bisected(0.0, 1.0, above)


def _bisected(low: float, high: float, above: Callable[[float], bool]) -> float:
    """The least number at which `above` holds."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return high
