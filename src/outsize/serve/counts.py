"""What a server counts, from its start: requests, tokens, and the times that clients saw."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds


class Histogram:
    """How often a time was at most so long."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(BUCKETS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BUCKETS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for limit, count in zip((*map(str, BUCKETS), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{limit}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Counts:
    """Of one server."""

    def __init__(self) -> None:
        self.requests = Counter[tuple[str, int]]()  # by dialect and status
        self.in_flight = 0  # POST requests that are being answered
        self.tokens = Counter[str]()  # of prompts, and new
        self.first_token, self.gap = Histogram(), Histogram()
