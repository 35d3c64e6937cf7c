"""A plan of several ranks: who holds what, what a token costs on the wire and in time, which way is best.

A token's time is that of the slowest rank's parts of a layer, one after the other, the head on the leader,
and for each meeting of the ranks a message's software, the link's latency and its bytes over the link's rate.
From headers and what was measured of this machine: other machines are taken for equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from outsize.errors import OutsizeError
from outsize.home import home
from outsize.log import say, silent
from outsize.model_parts import Shard
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.pack.outline import Outline, head_of
from outsize.parallel.shard import outlined
from outsize.parallel.slow import Link
from outsize.parallel.spec import parse_parallel
from outsize.parallel.split import UNCUT, Ranks, Way, check, split
from outsize.plan import decide, machine
from outsize.plan.compute_times import IN_TURN
from outsize.plan.cost import UNHIDDEN
from outsize.plan.cost import step_s as step_seconds
from outsize.plan.machine import Compute
from outsize.plan.make import computing
from outsize.plan.place import tokenizer_bytes
from outsize.plan.placement import Placement
from outsize.plan.probe import set_threads
from outsize.plan.rank_room import most_parts
from outsize.plan.warmup import runtime_bytes
from outsize.system import memory

WAYS = (Way("gather"), Way("sum"), Way("sum", "heads"), Way("experts"), Way("layers"))
# Seconds of software for a message of one token, as measured on two cores of an EPYC between namespaces.
SOFTWARE_S = {"torch": 150e-6, "sockets": 25e-6, "auto": 25e-6}
LOOPBACK = "10Gbit/s,0.01ms"


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank's share, and what it holds of it."""

    shard: Shard
    placement: Placement
    size: int  # bytes of its weights

    def to_json(self) -> dict[str, object]:
        p, s = self.placement, self.shard
        return {
            "rank": s.rank, "neurons": list(s.neurons), "heads": list(s.heads), "layers": list(s.layers),
            "weights_bytes": self.size,
            "held_bytes": p.held, "streamed_bytes": p.streamed, "planned_bytes": p.planned,
            "budget_bytes": p.budget, "context": p.context,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class WayPlan:
    """One way of sharing a model out. `refused`: why it cannot be; then there is nothing else."""

    way: Way
    ranks: tuple[RankPlan, ...] = ()
    messages: int = 0  # that a rank sends for a token, to each other rank
    sent: int = 0  # bytes that the rank that sends most sends for a token, to all
    token_s: float = 0.0
    wire_s: float = 0.0  # of it, meeting the others
    refused: str = ""

    @property
    def name(self) -> str:
        if self.way.cut in ("layers", "experts", "whole"):
            return {"layers": "relay", "experts": "experts", "whole": "runahead"}[self.way.cut]
        return f"tensor:cut={self.way.cut},attention={self.way.attention}"

    def to_json(self) -> dict[str, object]:
        if self.refused:
            return {"way": self.name, "refused": self.refused}
        return {
            "way": self.name, "is_exact": self.way.cut not in ("sum", "experts"), "messages": self.messages,
            "sent_bytes": self.sent, "token_s": round(self.token_s, 6), "wire_s": round(self.wire_s, 6),
            "tokens_per_s": round(1 / self.token_s, 3), "ranks": [r.to_json() for r in self.ranks],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class RanksPlan:
    """All that `outsize plan --ranks` shows."""

    outline: Outline
    link: Link
    over: str
    ways: tuple[WayPlan, ...]

    @property
    def best(self) -> WayPlan | None:
        """The fastest."""
        return min((w for w in self.ways if not w.refused), key=lambda w: w.token_s, default=None)

    def to_json(self) -> dict[str, object]:
        best = self.best
        return {
            "model": self.outline.name, "weights_bytes": self.outline.size, "over": self.over,
            "latency_s": self.link.delay_s, "link_bytes_per_s": self.link.bytes_per_s,
            "ways": [w.to_json() for w in self.ways], "best": None if best is None else best.name,
        }  # fmt: skip


def make(model: str, options: LoadOptions, link: Link) -> RanksPlan:
    """Plan from headers alone. Raises UnsupportedError for a model that ranks cannot share, and what finding
    a model raises."""
    decide.check(options)
    set_threads(options.threads)
    native, spec = decide.compiled(options), parse_parallel(options.parallel)
    size, runtime = memory.parse(options.memory), runtime_bytes(native)
    whole = fetch.outline(model, options.encoding, options.quiet)
    here = machine.known(home(), silent if options.quiet else say)
    here, compute = computing(whole, here, native, IN_TURN)
    figures = _Figures(whole, compute, here.disk_bytes_per_s, link, SOFTWARE_S[spec.over])
    asked = [w for w in WAYS if w.cut != "experts" or whole.description.mixture is not None]
    if options.parallel != "tensor":
        asked = [spec.way]
        check(whole.name, whole.description, options.ranks, spec.way)
    ways = tuple(_way(figures, way, options, (size, runtime)) for way in asked)
    return RanksPlan(whole, link, spec.over, ways)


def _way(figures: _Figures, way: Way, options: LoadOptions, sizes: tuple[int, int]) -> WayPlan:
    whole, (size, runtime) = figures.whole, sizes
    try:
        shards = split(
            whole.name, whole.description, whole.tables, _equal(whole, way, options, sizes), way
        )
        ranks = tuple(_rank(whole, s, options, (size, runtime)) for s in shards)
    except OutsizeError as e:
        return WayPlan(way, refused=str(e))
    wire_s, messages, sent = figures.wire(way, shards)
    return WayPlan(way, ranks, messages, sent, figures.token_s(way, ranks) + wire_s, wire_s)


def _equal(whole: Outline, way: Way, options: LoadOptions, sizes: tuple[int, int]) -> Ranks:
    """Ranks as fast and as large as each other, of which the first has the head, too."""
    told = dict(zip(("memory", "runtime"), sizes, strict=True))
    most = (most_parts(whole, told, r == 0, (options.context, way)) for r in range(options.ranks))
    return Ranks((1.0,) * options.ranks, () if way.cut in UNCUT else tuple(most))


def _rank(whole: Outline, shard: Shard, options: LoadOptions, sizes: tuple[int, int]) -> RankPlan:
    """Raises BudgetError, ContextError."""
    outline = outlined(whole, shard)
    options = replace(options, draft="none", prefix_cache="off")
    placement = decide.decide(outline, options, *sizes, tokenizer_bytes(outline))
    return RankPlan(shard, placement, outline.size)


@dataclass(frozen=True, slots=True)
class _Figures:
    """What times are made of."""

    whole: Outline
    compute: Compute
    disk_bytes_per_s: float
    link: Link
    software_s: float

    def wire(self, way: Way, shards: Sequence[Shard]) -> tuple[float, int, int]:
        """Of a token: seconds, a rank's messages to each other rank, and bytes that one sends to all."""
        d, others = self.whole.description, len(shards) - 1
        if way.cut == "whole":
            return 0.0, 0, 0
        each_s = self.software_s + self.link.delay_s
        if way.cut == "experts":
            count, sent = len(d.routed), 4 * d.width * others
            return count * (each_s + sent / self.link.bytes_per_s), count, count * sent
        if way.cut == "layers":
            sent = 4 * d.width
            return len(shards) * (each_s + sent / self.link.bytes_per_s), 1, sent
        number = self.whole.activation_bytes
        if way.cut == "gather":
            most = max(b - a + s.outer for s in shards for a, b in [s.neurons])
            meetings, sent = 2, most * number
        else:
            meetings = 2 if way.attention == "heads" else 1
            sent = meetings * d.width * number
        total = d.num_layers * sent * others
        seconds = d.num_layers * meetings * each_s + total / self.link.bytes_per_s
        return seconds, meetings * d.num_layers, total

    def token_s(self, way: Way, ranks: Sequence[RankPlan]) -> float:
        """Of computing and reading, without the wire."""
        d, step_s = self.whole.description, self.compute.step_s
        if way.cut == "layers":
            compute_s = step_seconds(self.whole, self.compute)
            return sum(self._with_reads(compute_s / len(ranks), r) for r in ranks)
        if (
            way.cut in UNCUT
        ):  # what experts' shares save is not counted: which are chosen is not known
            compute_s = step_seconds(self.whole, self.compute)
            return max(self._with_reads(compute_s, r) for r in ranks)
        total = {"attn": 0.0, "ffn": 0.0}
        for t in self.whole.tables:
            kind = t.name.split("-")[0]
            if t.name in step_s and kind in total:
                total[kind] += step_s[t.name] * len(t.keys)
        share = max((b - a) / d.ffn_width for r in ranks for a, b in [r.shard.neurons])
        heads = max((b - a) / d.num_heads for r in ranks for a, b in [r.shard.heads])
        head = self.whole.table(head_of(d))
        compute_s = total["attn"] * heads + total["ffn"] * share
        compute_s += step_s.get(head.name, 0.0) * len(head.keys)
        return max(self._with_reads(compute_s, r) for r in ranks)

    def _with_reads(self, compute_s: float, rank: RankPlan) -> float:
        read_s = rank.placement.streamed / self.disk_bytes_per_s
        return max(compute_s, read_s) + UNHIDDEN * min(compute_s, read_s)
