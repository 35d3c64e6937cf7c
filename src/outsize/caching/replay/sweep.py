"""A sweep of replays: every trace under every policy, capacity, prefetcher, miss handler and bandwidth."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context

from outsize.caching import misses, prefetcher
from outsize.caching.policy import Hints, make
from outsize.caching.replay.simulate import Link, Outcome, Replay, ReplaySetup
from outsize.caching.replay.trace import Trace, waves
from outsize.errors import OptionError, TraceError

PHASES = ("prompt", "decode")
RECORD_BYTES = 3 << 20  # where neither the trace nor the user says


@dataclass(frozen=True, slots=True)
class Cell:
    """One replay. `trace`: its place in the list; `capacity`: a share of all experts."""

    trace: int
    capacity: float
    eviction: str
    prefetch: str
    missing: str
    bytes_per_s: float
    per_layer: bool  # each layer has slots of its own


@dataclass(frozen=True, slots=True)
class Setting:
    """What all replays share."""

    traces: tuple[Trace, ...]
    record_bytes: int | None
    layer_s: float
    expert_s: float


Row = dict[str, float | int | str]


@dataclass(frozen=True, slots=True)
class Grid:
    """What is combined with what: all values of each setting."""

    capacities: Sequence[float]
    evictions: Sequence[str]
    prefetches: Sequence[str]
    missings: Sequence[str]
    rates: Sequence[float]
    per_layer: bool

    def cells(self, traces: int) -> list[Cell]:
        """Every combination, for each of so many traces."""
        axes = product(
            range(traces),
            self.capacities,
            self.evictions,
            self.prefetches,
            self.missings,
            self.rates,
        )
        return [Cell(*axis, self.per_layer) for axis in axes]


def check(setting: Setting, cells: Sequence[Cell]) -> None:
    """Raises TraceError if a capacity cannot hold what one token needs, or a trace lacks what a
    prefetcher reads; OptionError for prefetching where each layer is by itself."""
    for cell in cells:
        trace = setting.traces[cell.trace]
        _check_prefetch(trace, cell)
        pools = trace.layers if cell.per_layer else 1
        if int(cell.capacity * trace.size / pools) < trace.used:
            raise TraceError(
                f"a capacity of {cell.capacity:.2%} of {trace.name} is "
                f"{int(cell.capacity * trace.size / pools)} slots, fewer than the {trace.used} experts that "
                f"a token needs in a layer; give at least {trace.used * pools / trace.size:.2%}"
            )


def _check_prefetch(trace: Trace, cell: Cell) -> None:
    if prefetcher.reads_early(cell.prefetch) and not any(e.early for e in trace.events):
        raise TraceError(
            f"prefetch {cell.prefetch!r} reads what each gate says one layer early, and {trace.name} does "
            "not tell that: it would be the same as none; record a trace with `outsize trace`"
        )
    if cell.per_layer and cell.prefetch != "none":
        raise OptionError(
            f"prefetch {cell.prefetch!r} reads ahead from layer to layer, and with --per-layer each is "
            "replayed by itself; use --global, or leave it out"
        )


def run(
    setting: Setting, cells: Sequence[Cell], processes: int | None = None
) -> Iterator[list[Row]]:
    """The rows of each cell, one a phase, as they are done, in order."""
    count = min(processes or os.cpu_count() or 1, len(cells))
    if count <= 1 or len(cells) < 8:
        yield from (one(setting, cell) for cell in cells)
        return
    with ProcessPoolExecutor(count, get_context("spawn"), _begin, (setting,)) as pool:
        yield from pool.map(_one, cells, chunksize=2)


_here: list[Setting] = []  # of a worker process


def _begin(setting: Setting) -> None:
    _here.append(setting)


def _one(cell: Cell) -> list[Row]:
    return one(_here[0], cell)


def one(setting: Setting, cell: Cell) -> list[Row]:
    """Replay one cell."""
    trace = setting.traces[cell.trace]
    size = setting.record_bytes or trace.record_bytes or RECORD_BYTES
    link = Link(cell.bytes_per_s, size, layer_s=setting.layer_s, expert_s=setting.expert_s)
    slots = int(cell.capacity * trace.size)
    found = (
        _layers(trace, cell, link, slots)
        if cell.per_layer
        else _replay(trace, cell, link, slots, trace)
    )
    return [_row(trace, cell, slots, PHASES[phase], out) for phase, out in sorted(found.items())]


def _layers(trace: Trace, cell: Cell, link: Link, slots: int) -> dict[int, Outcome]:
    """Each layer by itself, with its share of the slots. Times add up as if layers never overlapped."""
    total: dict[int, Outcome] = {}
    for layer in range(trace.layers):
        part = Trace(
            trace.name, trace.layers, trace.experts, trace.used, trace.record_bytes,
            tuple(e for e in trace.events if e.layer == layer),
        )  # fmt: skip
        for phase, out in _replay(trace, cell, link, slots // trace.layers, part).items():
            so_far = total.setdefault(phase, Outcome(out.stats - out.stats))
            so_far.stats += out.stats
            so_far.seconds += out.seconds
            so_far.tokens = max(so_far.tokens, out.tokens)
    return total


def _replay(trace: Trace, cell: Cell, link: Link, slots: int, part: Trace) -> dict[int, Outcome]:
    hints = Hints(future=(), ranked=_ranked(part), per_layer=trace.experts, layers=trace.layers)
    policy = make(cell.eviction, slots, hints)
    events = waves(part.events, policy.room)
    if cell.eviction == "belady":
        policy = make(cell.eviction, slots, Hints(future=[e.ids for e in events]))
    ahead = prefetcher.make(cell.prefetch, trace.experts)
    missing = misses.make(cell.missing)
    setup = ReplaySetup(policy, slots, link, ahead, missing, trace.experts)
    return Replay(setup).run(events)


def _ranked(trace: Trace) -> list[int]:
    """By use in this very trace: the best that a profile could be."""
    uses = Counter(i for e in trace.events for i in e.ids)
    return [i for i, _ in uses.most_common()]


def _row(trace: Trace, cell: Cell, slots: int, phase: str, out: Outcome) -> Row:
    t, tokens = out.stats, max(1, out.tokens)
    asked = max(1, t.hits + t.misses)
    return {
        "trace": trace.name, "eviction": cell.eviction, "prefetch": cell.prefetch,
        "miss": cell.missing, "pool": "layer" if cell.per_layer else "global",
        "capacity": cell.capacity, "slots": slots, "bytes_per_s": cell.bytes_per_s, "phase": phase,
        "tokens": out.tokens, "requests": t.hits + t.misses,
        "hit_rate": round((t.hits + t.ready) / asked, 5), "reuse_hit_rate": round(t.hits / asked, 5),
        "ready": t.ready, "late": t.late, "cold_misses": t.cold, "capacity_misses": t.capacity,
        "collision_misses": t.collision, "dropped": t.dropped, "substituted": t.substituted,
        "copied": t.copied,
        "bytes_demanded": t.bytes_demanded, "bytes_useful": t.bytes_useful,
        "bytes_wasted": t.bytes_wasted, "stall_s_per_token": round(t.waited_s / tokens, 6),
        "s_per_token": round(out.seconds / tokens, 6),
    }  # fmt: skip
