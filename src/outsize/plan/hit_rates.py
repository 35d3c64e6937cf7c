"""Expected hit rate of the expert cache, by the share of experts that have slots: from a recorded trace of
routing, or a prior, which is what our policy reached in decoding on two traces (docs/results/specmd.md)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from outsize.caching.replay.sweep import Cell, Setting, one
from outsize.caching.replay.trace import Trace
from outsize.errors import TraceError
from outsize.model_config import Description

DECODING = "decode"
SHARES = (0.01, 0.02, 0.05, 0.10, 0.20, 0.40)


@dataclass(frozen=True, slots=True)
class HitRates:
    """Points (share of experts with slots, lower rate, higher rate), rising; `source`: where from."""

    source: str
    points: tuple[tuple[float, float, float], ...]

    def __call__(self, share: float) -> tuple[float, float]:
        """The lower and the higher hit rate at a share, interpolated."""
        for (x0, *y0), (x1, *y1) in pairwise(((0.0, 0.0, 0.0), *self.points, (1.0, 1.0, 1.0))):
            if share <= x1:
                part = (share - x0) / (x1 - x0)
                low, high = (a + (b - a) * part for a, b in zip(y0, y1, strict=True))
                return low, high
        return 1.0, 1.0


LOW = (0.137, 0.239, 0.420, 0.601, 0.769, 0.877)
HIGH = (0.188, 0.292, 0.487, 0.632, 0.788, 0.946)
ALL_USED = HitRates("each token uses all pieces", ((0.5, 0.5, 0.5),))  # of nested experts
# Of rows by token on four texts, begun with those that another text uses most, by recency
# (docs/results/memoryllm.md).
BY_TEXT = HitRates("a prior", ((0.05, 0.79, 0.965), (0.10, 0.85, 0.976), (0.20, 0.90, 0.983)))
PRIOR = HitRates("a prior", tuple(zip(SHARES, LOW, HIGH, strict=True)))


def recorded(trace: Trace, d: Description, eviction: str) -> HitRates:
    """The hit rates of an eviction policy on a trace of this model, replayed at each share. Raises TraceError
    for another model's."""
    shape = None if d.mixture is None else (len(d.routed), d.mixture.count)
    if shape != (trace.layers, trace.experts):
        raise TraceError(
            f"{trace.name} has {trace.layers} layers of {trace.experts} experts, this model "
            f"{'none' if shape is None else f'{shape[0]} of {shape[1]}'}; record one with `outsize trace`"
        )
    setting = Setting((trace,), None, 0.0, 0.0)
    points = []
    for share in (s for s in SHARES if int(s * trace.size) >= trace.used):
        rows = one(setting, Cell(0, share, eviction, "none", "fetch", 1e9, False))
        rate = float(next(r for r in rows if r["phase"] == DECODING)["reuse_hit_rate"])
        points.append((share, rate, rate))
    return HitRates(trace.name, tuple(points))
