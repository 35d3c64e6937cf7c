"""Set echo's constants on one trace and report them on another, both ways:
`python bench/tune_echo.py TRACE_A TRACE_B`. Coordinate search over each constant, judged by the mean share of
the gap between the best rival and Belady that is closed at 5, 10 and 20 % (decode, demand-only, global pool).
One JSON object a direction.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from specmd import replay

from outsize.caching.eviction import echo
from outsize.caching.replay.trace import Trace, read

SHARES = (0.05, 0.10, 0.20)
RIVALS = ("lru", "lfu", "lfru", "least_stale")
CHOICES = {
    "SHARPNESS": (6.0, 9.0, 12.0, 16.0, 22.0),
    "FADING": (0.6, 0.7, 0.8, 0.9),
    "TRUST": (0.2, 0.4, 0.6, 0.8),
    "AFTER": (0.1, 0.25, 0.5, 0.7),
    "DECAYS": (
        (0.5, 0.9, 0.98),
        (0.7, 0.95),
        (0.8, 0.95, 0.99),
        (0.3, 0.7, 0.9, 0.97),
        (0.9, 0.98),
    ),
}


def hits(trace: Trace, policy: str) -> list[float]:
    return [replay(trace, policy, share).stats.hit_rate for share in SHARES]


def bounds(trace: Trace) -> tuple[list[float], list[float]]:
    """The best rival, and Belady, at each capacity."""
    rivals = [hits(trace, r) for r in RIVALS]
    return [max(column) for column in zip(*rivals, strict=True)], hits(trace, "belady")


def closed(trace: Trace, low: list[float], high: list[float]) -> list[float]:
    """Of the gap, at each capacity, with the constants as they are now."""
    now = hits(trace, "echo")
    return [(h - a) / (b - a) for h, a, b in zip(now, low, high, strict=True)]


def put(name: str, value: object) -> None:
    setattr(echo, name, np.array(value, np.float32) if name == "DECAYS" else value)


def tuned(trace: Trace, low: list[float], high: list[float]) -> dict[str, object]:
    """The constants that close most, one at a time, twice round."""
    best = {name: values[len(values) // 2] for name, values in CHOICES.items()}
    best["DECAYS"] = CHOICES["DECAYS"][0]
    for name, value in best.items():
        put(name, value)
    score = float(np.mean(closed(trace, low, high)))
    for _ in range(2):
        for name, values in CHOICES.items():
            for value in values:
                put(name, value)
                now = float(np.mean(closed(trace, low, high)))
                if now > score + 1e-4:
                    score, best[name] = now, value
            put(name, best[name])
    return best


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("traces", nargs=2, type=Path)
    traces = [read(path) for path in p.parse_args().traces]
    known = [bounds(trace) for trace in traces]
    for own, other in ((0, 1), (1, 0)):
        chosen = tuned(traces[own], *known[own])
        print(json.dumps({
            "tuned_on": traces[own].name, "reported_on": traces[other].name, "shares": SHARES,
            "constants": chosen, "closed_own": closed(traces[own], *known[own]),
            "closed_other": closed(traces[other], *known[other]),
            "echo_other": hits(traces[other], "echo"), "rival_other": known[other][0],
            "belady_other": known[other][1],
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
