"""A plan of several ranks as text."""

from __future__ import annotations

from collections.abc import Iterator

from outsize.plan.ranks import RanksPlan, WayPlan
from outsize.report.plan_text import mb

EXACT = {
    "gather": "the bits of one rank",
    "sum": "equal to rounding",
    "layers": "the bits of one rank",
    "experts": "equal to rounding",
    "whole": "the bits of one rank; shares long prompts alone",
}


def long(plan: RanksPlan) -> Iterator[str]:
    """By lines: of each way who holds what, then the ways beside each other."""
    link, o = plan.link, plan.outline
    yield (
        f"{o.name} ({mb(o.size)} of weights) over {plan.over}, {link.bytes_per_s * 8 / 1e6:,.0f} Mbit/s and "
        f"{link.delay_s * 1e3:.3g} ms; ranks are taken to be as fast as this machine"
    )
    for way in plan.ways:
        yield ""
        yield from _way(way)
    best = plan.best
    if best is not None:
        yield ""
        yield f"fastest: --parallel {best.name} ({EXACT[best.way.cut]})"


def _way(way: WayPlan) -> Iterator[str]:
    if way.refused:
        yield f"{way.name}: cannot be: {way.refused}"
        return
    yield (
        f"{way.name} ({EXACT[way.way.cut]}): {1 / way.token_s:.3g} tokens/s; a token: {way.messages} "
        f"messages to each other rank, {way.sent:,} bytes sent, {way.wire_s * 1e3:.3g} of "
        f"{way.token_s * 1e3:.3g} ms on the wire"
    )
    titles = (
        ("rank", 6),
        ("layers", 8),
        ("neurons", 10),
        ("heads", 8),
        ("weights MB", 12),
        ("in memory", 12),
    )
    yield "".join(f"{t:>{n}}" for t, n in (*titles, ("a pass reads", 14), ("plan of", 18)))
    for r in way.ranks:
        s, p = r.shard, r.placement
        of = f"{p.planned / 1e6:,.0f} of {p.budget / 1e6:,.0f}"
        layers, neurons, heads = (b - a for a, b in (s.layers, s.neurons, s.heads))
        yield (
            f"{s.rank:>6}{layers:>8}{neurons:>10,}{heads:>8}{r.size / 1e6:>12,.0f}{p.held / 1e6:>12,.0f}"
            f"{p.streamed / 1e6:>14,.0f}{of:>18}"
        )
