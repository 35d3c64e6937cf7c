"""The page of `outsize bench cache`: hit rate against capacity, stall against bandwidth, kinds of misses, and
which experts are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from outsize.caching.replay.sweep import Row
from outsize.caching.replay.trace import Trace
from outsize.report import svg

KINDS = ("ready", "late", "cold_misses", "capacity_misses", "collision_misses", "dropped")


def page(traces: Sequence[Trace], rows: Sequence[Row], why: str) -> str:
    """The page. `why`: what it advises."""
    parts = [f"<p><b>{escape(why)}</b></p>"]
    for trace in traces:
        mine = [r for r in rows if r["trace"] == trace.name and r["phase"] == "decode"]
        parts += _of(trace, mine)
    parts.append("<h2>All decoding rows</h2>")
    keys = ("eviction", "prefetch", "miss", "capacity", "bytes_per_s", "hit_rate", "reuse_hit_rate",
            "stall_s_per_token", "collision_misses")  # fmt: skip
    shown = [
        [str(r["trace"]), *(_shown(k, r[k]) for k in keys)] for r in rows if r["phase"] == "decode"
    ]
    parts.append(svg.table(["trace", *keys], shown))
    return svg.page("outsize bench cache", parts)


def _of(trace: Trace, rows: Sequence[Row]) -> Iterator[str]:
    shape = f"{trace.layers} layers of {trace.experts} experts, {trace.used} used"
    yield f"<h2>{escape(trace.name)}: {shape}</h2>"
    capacities = sorted({float(r["capacity"]) for r in rows})
    rates = sorted({float(r["bytes_per_s"]) for r in rows})
    labels = [f"{c:.3g}" for c in (100 * c for c in capacities)]
    slow = [r for r in rows if r["bytes_per_s"] == rates[0]]
    yield "<h3>In memory when asked for, while decoding</h3>"
    yield svg.lines(_curves(slow, "capacity", capacities, "hit_rate"), "slots, % of experts",
                    "share of requests", labels)  # fmt: skip
    middle = capacities[len(capacities) // 2]
    there = [r for r in rows if r["capacity"] == middle]
    if len(rates) > 1:
        yield f"<h3>Stall a token with {middle:.1%} of the experts</h3>"
        yield svg.lines(_curves(there, "bytes_per_s", rates, "stall_s_per_token"), "link, GB/s",
                        "seconds", [f"{r / 1e9:.3g}" for r in rates])  # fmt: skip
    yield f"<h3>Kinds of misses with {middle:.1%} of the experts, decoding</h3>"
    yield svg.stacks(
        {
            _name(r): {k: float(r[k]) for k in KINDS if r[k]}
            for r in there
            if r["bytes_per_s"] == rates[0]
        },
        "misses",
    )
    yield "<h3>How often each expert is used</h3>"
    yield svg.heat(_uses(trace), "expert", "layer")


def _shown(key: str, value: float | int | str) -> str:
    if key == "bytes_per_s":
        return f"{float(value) / 1e9:g} GB/s"
    return f"{float(value):.1%}" if key == "capacity" else str(value)


def _name(row: Row) -> str:
    extra = [
        str(row[k]) for k, usual in (("prefetch", "none"), ("miss", "fetch")) if row[k] != usual
    ]
    return " ".join([str(row["eviction"]), *extra])


def _curves(
    rows: Sequence[Row], key: str, places: Sequence[float], value: str
) -> dict[str, list[tuple[float, float]]]:
    out: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        out.setdefault(_name(row), []).append((places.index(float(row[key])), float(row[value])))
    return out


def _uses(trace: Trace) -> list[list[float]]:
    out = [[0.0] * trace.experts for _ in range(trace.layers)]
    for event in trace.events:
        for ids in event.rows:
            for i in ids:
                out[i // trace.experts][i % trace.experts] += 1
    return out
