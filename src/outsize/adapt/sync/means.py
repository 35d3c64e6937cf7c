"""Means over sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence


def interval(rises: Sequence[float]) -> tuple[float, float]:
    """Of the mean: two standard errors around it."""
    mean, num = mean_of(rises), len(rises)
    error = math.sqrt(sum((r - mean) ** 2 for r in rises) / max(1, num - 1) / num)
    return mean - 2 * error, mean + 2 * error


def minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def mean_of(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
