"""Exchanges summed up: percentiles, rates, errors by kind."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from outsize.bench.serve.client import Exchange

Row = dict[str, Any]
DIGITS = 5


def percentiles(values: Iterable[float]) -> Row | None:
    """p50, p95, p99 (the least value that so many are not above) and the most, of what is a number."""
    ordered = sorted(v for v in values if not math.isnan(v))
    if not ordered:
        return None
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "most": 1.0}
    return {
        name: round(ordered[math.ceil(share * len(ordered)) - 1], DIGITS)
        for name, share in shares.items()
    }


def summed(exchanges: Sequence[Exchange]) -> Row:
    """Of exchanges that ran beside one another: times in seconds, all tokens over the time from the first
    beginning to the last end."""
    good = [e for e in exchanges if not e.error]
    began = min((e.began for e in exchanges), default=0.0)
    ended = max((e.began + e.seconds for e in exchanges), default=0.0)
    tokens = sum(e.new_tokens or len(e.events) for e in good)
    return {
        "requests": len(exchanges), "errors": dict(Counter(e.error for e in exchanges if e.error)),
        "prompt_tokens": statistics.median(e.prompt_tokens for e in good) if good else 0,
        "cached_tokens": sum(e.cached_tokens for e in good), "new_tokens": tokens,
        "seconds": round(ended - began, DIGITS),
        "tokens_per_s": round(tokens / max(ended - began, 1e-9), 3),
        "first_token_s": percentiles(e.first_s for e in good),
        "gap_s": percentiles(gap for e in good for gap in e.gaps),
        "silence_s": round(max((e.silence_s for e in exchanges), default=0.0), DIGITS),
    }  # fmt: skip


def together(exchanges: Sequence[Exchange]) -> Row:
    """Gaps and rate while all of them got text: from the last one's first text to the first one's last."""
    streams = [[e.began + t for t in e.events] for e in exchanges if len(e.events) > 1]
    begin = max((s[0] for s in streams), default=0.0)
    end = min((s[-1] for s in streams), default=0.0)
    return within(exchanges, begin, end)


def within(exchanges: Sequence[Exchange], begin: float, end: float) -> Row:
    """Gaps that ended, and text that came, between two moments (of time.perf_counter)."""
    gaps, tokens = list[float](), 0.0
    for e in exchanges:
        times = [e.began + t for t in e.events]
        a_piece = (e.new_tokens or len(e.events)) / max(1, len(e.events))
        tokens += a_piece * sum(begin < t <= end for t in times)
        gaps += [b - a for a, b in pairwise(times) if begin < b <= end]
    return {
        "seconds": round(max(0.0, end - begin), DIGITS),
        "tokens_per_s": round(tokens / (end - begin), 3) if end > begin else None,
        "gap_s": percentiles(gaps),
    }  # fmt: skip
