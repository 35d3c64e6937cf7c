"""The claims of SpecMD, one by one, on recorded traces and on synthetic routing:
`python bench/specmd.py TRACE... [-o FILE.json]`. Prints one JSON object a claim.

The recorded traces hold no early gate scores, so prefetchers that need them run on synthetic routing
(`synthetic`): expert scores that drift from token to token, and the same scores with noise one layer early.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from outsize.caching.policy import Hints, make
from outsize.caching.prefetcher import make as prefetcher
from outsize.caching.replay.simulate import Link, Outcome, Replay, ReplaySetup
from outsize.caching.replay.trace import Event, Trace, read, waves

RECORD = 3 << 20
POLICIES = ("lru", "fifo", "lfu", "lfru", "least_stale", "stale_cyclic", "echo", "belady")
AHEAD = ("none", "oracle:0.3", "oracle:0.5", "oracle:0.7", "oracle:0.85", "oracle", "previous:8")
SHARES = (0.01, 0.02, 0.05, 0.10, 0.20, 0.40)


def synthetic(
    layers: int = 16,
    experts: int = 64,
    used: int = 8,
    tokens: int = 300,
    noise: float = 0.45,
    seed: int = 0,
) -> Trace:
    """Scores = popularity + a part that drifts + a part of this token's own."""
    random = np.random.default_rng(seed)
    base = 0.8 * random.standard_normal((layers, experts))
    drift, events = random.standard_normal((layers, experts)), []
    for token in range(tokens):
        drift = 0.8 * drift + 0.6 * random.standard_normal((layers, experts))
        score = base + drift + 0.5 * random.standard_normal((layers, experts))
        early = score + noise * random.standard_normal((layers, experts))
        for layer in range(layers):
            best = np.argsort(-score[layer])[:used]
            weights = np.exp(score[layer][best]) / np.exp(score[layer]).sum()
            ahead = np.argsort(-early[layer])[: 4 * used]
            told = np.exp(early[layer][ahead]) / np.exp(early[layer]).sum()
            ids = tuple(int(layer * experts + e) for e in best)
            scored = tuple((int(e), float(w)) for e, w in zip(ahead, told, strict=True))
            events.append(
                Event(token, 1, layer, 1, ids, tuple(map(float, weights)), (ids,), scored)
            )
    return Trace("synthetic", layers, experts, used, RECORD, tuple(events))


def replay(
    trace: Trace, policy: str, share: float, ahead: str = "none", rate: float = 1e9, leases: bool = True,
    layer_s: float = 5e-4, phase: int = 1,
    most: int | None = None,
) -> Outcome:  # fmt: skip
    slots = max(trace.used, int(share * trace.size))
    hints = Hints(per_layer=trace.experts, layers=trace.layers)
    made = make(policy, slots, hints)
    events = waves(trace.events, made.room)
    if policy == "belady":
        made = make(policy, slots, Hints(future=[e.ids for e in events]))
    link = Link(rate, trace.record_bytes or RECORD, layer_s=layer_s)
    setup = ReplaySetup(
        made,
        slots,
        link,
        prefetcher(ahead, trace.experts),
        num_experts=trace.experts,
        leases=leases,
        most=most,
    )
    return Replay(setup).run(events)[phase]


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
    return {
        "claim": "hit rates while decoding",
        "shares": SHARES,
        "rates": table,
        "echo closes": gaps,
    }


def collisions(traces: Sequence[Trace]) -> dict[str, object]:
    """Collision misses a token, LRU against least-stale, with the next layer read ahead."""
    rows = []
    for t in traces:
        for share in (0.01, 0.02, 0.05):
            for leases in (True, False):
                for ahead in ("none", "oracle:0.85"):
                    found = {
                        p: round(replay(t, p, share, ahead, leases=leases).stats.collision, 3)
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
    rows = []
    for rate in (1e9, 3e9, 6e9):
        for share in (0.05, 0.1, 0.2):
            tops = {
                f"top:{k}": replay(trace, "least_stale", share, f"top:{k}", rate)
                for k in (2, 4, 6, 8)
            }
            scores = {
                f"score:{p}": replay(trace, "least_stale", share, f"score:{p}", rate)
                for p in (0.02, 0.03, 0.04, 0.05, 0.06, 0.08)
            }
            for name, out in tops.items():
                near = min(scores, key=lambda n: abs(_ahead(scores[n]) - _ahead(out)))
                rows.append({"GB/s": rate / 1e9, "share": share, name: [stall(out), round(_ahead(out))],
                             near: [stall(scores[near]), round(_ahead(scores[near]))]})  # fmt: skip
    better = sum(list(r.values())[3][0] < list(r.values())[2][0] for r in rows)
    return {
        "claim": "score beats top-k at equal bytes (stall ms, MB ahead)",
        "better": better,
        "of": len(rows),
        "rows": rows,
    }


def _ahead(out: Outcome) -> float:
    return (out.stats.bytes_useful + out.stats.bytes_wasted) / 1e6


def accuracy(traces: Sequence[Trace]) -> dict[str, object]:
    """Does a better predictor always stall less? Recall of the prefetcher against stall."""
    rows = {}
    for t in traces:
        for share in (0.05, 0.2):
            rows[f"{t.name} {share:.0%}"] = {
                a: stall(replay(t, "least_stale", share, a))
                for a in (
                    "none",
                    "oracle:0.3",
                    "oracle:0.5",
                    "oracle:0.7",
                    "oracle:0.85",
                    "oracle",
                    "previous:8",
                )
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


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("traces", nargs="+", type=Path)
    p.add_argument("-o", "--output", type=Path)
    a = p.parse_args()
    traces = [read(path) for path in a.traces]
    found = [
        orientation(traces), collisions(traces), five_percent(traces),
        score_against_top(synthetic()), accuracy(traces), traps(),
    ]  # fmt: skip
    for item in found:
        print(json.dumps(item), flush=True)
    if a.output is not None:
        a.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
