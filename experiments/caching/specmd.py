"""The claims of SpecMD, one by one, on recorded traces and on synthetic routing:
`python -m experiments.caching.specmd TRACE... [-o FILE.json]`. One JSON list.

The recorded traces hold no early gate scores, so prefetchers that need them run on synthetic routing
(`synthetic`): expert scores that drift from token to token, and the same scores with noise one layer early.

`--tune TRACE TRACE` sets echo's constants on one trace and reports them on the other, both ways: coordinate
search over each constant, judged by the mean share of the gap between the best rival and Belady that is
closed (decode, demand-only, global pool). One JSON object a direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from experiments.runs import arguments, record, told_all
from outsize.caching.eviction import echo
from outsize.caching.policy import Hints, make
from outsize.caching.prefetcher import make as prefetcher
from outsize.caching.replay.simulate import Link, Outcome, Replay, ReplaySetup
from outsize.caching.replay.trace import Event, Trace, read, waves

RECORD = 3 << 20
POLICIES = ("lru", "fifo", "lfu", "lfru", "least_stale", "stale_cyclic", "echo", "belady")
AHEAD = ("none", "oracle:0.3", "oracle:0.5", "oracle:0.7", "oracle:0.85", "oracle", "previous:8")
SHARES = (0.01, 0.02, 0.05, 0.10, 0.20, 0.40)


LAYERS, EXPERTS, USED, TOKENS, NOISE = 16, 64, 8, 300, 0.45  # of synthetic routing


def synthetic() -> Trace:
    """Scores = popularity + a part that drifts + a part of this token's own."""
    random = np.random.default_rng(0)
    base = 0.8 * random.standard_normal((LAYERS, EXPERTS))
    drift, events = random.standard_normal((LAYERS, EXPERTS)), []
    for token in range(TOKENS):
        drift = 0.8 * drift + 0.6 * random.standard_normal((LAYERS, EXPERTS))
        score = base + drift + 0.5 * random.standard_normal((LAYERS, EXPERTS))
        early = score + NOISE * random.standard_normal((LAYERS, EXPERTS))
        for layer in range(LAYERS):
            best = np.argsort(-score[layer])[:USED]
            weights = np.exp(score[layer][best]) / np.exp(score[layer]).sum()
            ahead = np.argsort(-early[layer])[: 4 * USED]
            told = np.exp(early[layer][ahead]) / np.exp(early[layer]).sum()
            ids = tuple(int(layer * EXPERTS + e) for e in best)
            scored = tuple((int(e), float(w)) for e, w in zip(ahead, told, strict=True))
            weighed = tuple(map(float, weights))
            events.append(Event(token, 1, layer, 1, ids, weighed, (ids,), scored))
    return Trace("synthetic", LAYERS, EXPERTS, USED, RECORD, tuple(events))


def replay(
    trace: Trace, policy: str, share: float, ahead: str = "none", leases: bool = True,
    rate: float = 1e9, layer_s: float = 5e-4, most: int | None = None,
) -> Outcome:  # fmt: skip
    """Of decoding, with slots for a share of all experts."""
    slots = max(trace.used, int(share * trace.size))
    made = make(policy, slots, Hints(per_layer=trace.experts, layers=trace.layers))
    events = waves(trace.events, made.room)
    if policy == "belady":
        made = make(policy, slots, Hints(future=[e.ids for e in events]))
    link = Link(rate, trace.record_bytes or RECORD, layer_s=layer_s)
    setup = ReplaySetup(
        made, slots, link, prefetcher(ahead, trace.experts),
        num_experts=trace.experts, leases=leases, most=most,
    )  # fmt: skip
    return Replay(setup).run(events)[1]


def hits(out: Outcome) -> tuple[float, float]:
    """(reuse alone, with what was read ahead)."""
    t = out.stats
    return round(t.hit_rate, 4), round((t.hits + t.ready + t.late) / (t.hits + t.misses), 4)


def stall(out: Outcome) -> float:
    return round(1e3 * out.stats.waited_s / out.tokens, 3)


def orientation(traces: Sequence[Trace]) -> dict[str, object]:
    """Decode hit rates, demand-only, global pool."""
    table = {
        t.name: {p: [hits(replay(t, p, s))[0] for s in SHARES] for p in POLICIES} for t in traces
    }
    gaps = {}
    for name, rates in table.items():
        rivals = [p for p in POLICIES if p not in ("echo", "belady", "stale_cyclic", "fifo")]
        best = [max(rates[p][i] for p in rivals) for i in range(len(SHARES))]
        gaps[name] = [
            round((o - b) / (c - b), 3) if c > b else None
            for o, b, c in zip(rates["echo"], best, rates["belady"], strict=True)
        ]
    claim = "hit rates while decoding"
    return {"claim": claim, "shares": SHARES, "rates": table, "echo closes": gaps}


def collisions(traces: Sequence[Trace]) -> dict[str, object]:
    """Collision misses a token, LRU against least-stale, with the next layer read ahead."""
    rows = []
    for t, share, leases, ahead in product(
        traces, SHARES[:3], (True, False), ("none", "oracle:0.85")
    ):
        found = {
            p: round(replay(t, p, share, ahead, leases).stats.collision, 3)
            for p in ("lru", "least_stale")
        }
        rows.append([t.name, share, "leases" if leases else "no leases", ahead, found])
    return {"claim": "collision misses, lru / least_stale", "rows": rows}


def five_percent(traces: Sequence[Trace]) -> dict[str, object]:
    """> 88 % at 5 %: reuse alone, and with what was read ahead."""
    rows = {
        t.name: {
            f"{p}, {a}": {
                "slots / pass": round(0.05 * t.size / (t.layers * t.used), 3),
                "hits": hits(replay(t, p, 0.05, a)),
            }
            for p in ("lru", "least_stale", "echo") for a in ("none", "oracle:0.85", "oracle")
        }
        for t in traces
    }  # fmt: skip
    return {"claim": "hit rate at 5 %: (reuse, with prefetch)", "rows": rows}


def score_against_top(trace: Trace) -> dict[str, object]:
    """Stall at nearly equal speculative bytes: top-k against score thresholds, at three links."""
    rows, better = [], 0
    settings = [f"top:{k}" for k in (2, 4, 6, 8)], [f"score:0.0{p}" for p in (2, 3, 4, 5, 6, 8)]
    for rate in (1e9, 3e9, 6e9):
        for share in (0.05, 0.1, 0.2):
            tops, scores = (
                {s: replay(trace, "least_stale", share, s, rate=rate) for s in kind}
                for kind in settings
            )
            for name, out in tops.items():
                near = min(scores, key=lambda n: abs(_ahead(scores[n]) - _ahead(out)))
                other = scores[near]
                better += stall(other) < stall(out)
                rows.append({"GB/s": rate / 1e9, "share": share, name: [stall(out), round(_ahead(out))],
                             near: [stall(other), round(_ahead(other))]})  # fmt: skip
    claim = "score beats top-k at equal bytes (stall ms, MB ahead)"
    return {"claim": claim, "better": better, "of": len(rows), "rows": rows}


def _ahead(out: Outcome) -> float:
    return (out.stats.bytes_useful + out.stats.bytes_wasted) / 1e6


def accuracy(traces: Sequence[Trace]) -> dict[str, object]:
    """Does a better predictor always stall less? Recall of the prefetcher against stall."""
    rows = {
        f"{t.name} {share:.0%}": {a: stall(replay(t, "least_stale", share, a)) for a in AHEAD}
        for t in traces
        for share in (0.05, 0.2)
    }
    return {"claim": "accuracy is not cache quality (stall ms a token)", "rows": rows}


def traps() -> dict[str, object]:
    """The two traps of implementation, on routing like the note's: 16 x 64, 8 used, 300 tokens."""
    trace = synthetic()
    fast = {"ahead": "oracle:0.85", "rate": 1e15, "layer_s": 1e-3, "most": trace.size}
    rows = {}
    for share in (0.02, 0.05, 0.1):
        rows[f"{share:.0%}"] = {
            f"{name}{'' if leases else ', no leases'}": hits(
                replay(trace, name, share, leases=leases, **fast)  # type: ignore[arg-type]
            )[1]
            for name in ("least_stale", "stale_layer", "lru", "fifo")
            for leases in (True, False)
        }
    return {"claim": "traps (hits with prefetch)", "rows": rows}


TUNED_AT = 0.05, 0.10, 0.20
RIVALS = ("lru", "lfu", "lfru", "least_stale")
CHOICES = {
    "SHARPNESS": (6.0, 9.0, 12.0, 16.0, 22.0),
    "FADING": (0.6, 0.7, 0.8, 0.9),
    "TRUST": (0.2, 0.4, 0.6, 0.8),
    "AFTER": (0.1, 0.25, 0.5, 0.7),
    "DECAYS": ((0.5, 0.9, 0.98), (0.7, 0.95), (0.8, 0.95, 0.99), (0.3, 0.7, 0.9, 0.97), (0.9, 0.98)),
}  # fmt: skip


def rates(trace: Trace, policy: str) -> list[float]:
    return [replay(trace, policy, share).stats.hit_rate for share in TUNED_AT]


def bounds(trace: Trace) -> tuple[list[float], list[float]]:
    """The best rival, and Belady, at each capacity."""
    rivals = [rates(trace, r) for r in RIVALS]
    return [max(column) for column in zip(*rivals, strict=True)], rates(trace, "belady")


def closed(trace: Trace, low: list[float], high: list[float]) -> list[float]:
    """Of the gap, at each capacity, with the constants as they are now."""
    now = rates(trace, "echo")
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


def tune(traces: list[Trace], output: Path | None) -> None:
    """On each of two traces, reported on the other."""
    known = [bounds(trace) for trace in traces]
    for own, other in ((0, 1), (1, 0)):
        chosen = tuned(traces[own], *known[own])
        record({
            "tuned_on": traces[own].name, "reported_on": traces[other].name, "shares": TUNED_AT,
            "constants": chosen, "closed_own": closed(traces[own], *known[own]),
            "closed_other": closed(traces[other], *known[other]),
            "echo_other": rates(traces[other], "echo"), "rival_other": known[other][0],
            "belady_other": known[other][1],
        }, output)  # fmt: skip


def main() -> None:
    a = arguments(__doc__, "traces+", tune=(False, "echo's constants, on two traces"))
    traces = [read(Path(path)) for path in a.traces]
    if a.tune:
        tune(traces, a.output)
        return
    told_all(
        [orientation(traces), collisions(traces), five_percent(traces),
         score_against_top(synthetic()), accuracy(traces), traps()],
        a.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()
