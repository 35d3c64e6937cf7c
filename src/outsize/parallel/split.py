"""Who holds what: a model's neurons, outputs and heads shared out over ranks by speed, then by memory.

Ranges are whole steps of what the encodings store together, so that codes are moved and never made anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import lcm

from outsize.encoding.find import encoding
from outsize.errors import OptionError, UnsupportedError
from outsize.model_config import Description
from outsize.model_parts import Shard, orders_fit
from outsize.pack.tables import Matrix, TableHeader

UNITS = 64, 32, 16  # kernels' blocks of rows; the largest of which there are enough
MOST = 64  # ranks
UNCUT = "whole", "experts"  # ways in which each rank has the model's own pack


@dataclass(frozen=True, slots=True)
class Ranks:
    """How fast ranks are, as parts of all, and how many neurons each has memory for (None: for all)."""

    speeds: tuple[float, ...]
    most: tuple[int | None, ...] = ()

    @property
    def world(self) -> int:
        return len(self.speeds)


@dataclass(frozen=True, slots=True)
class Way:
    """How a model is cut. "gather": gate and up by neurons, down by outputs, whole vectors gathered: the bits
    of one rank. "sum": down by neurons, partial sums added: to rounding. "layers": each rank has some layers,
    whole, and rows pass through all ranks: the bits of one. "whole": each has all; prompts are shared.
    "experts": each has all, and computes some of the experts of each layer: to rounding."""

    cut: str = "gather"
    attention: str = "whole"
    key_ends: tuple[int, ...] = ()  # where each rank's key heads end, where that is not by speed
    key_orders: tuple[
        tuple[int, ...], ...
    ] = ()  # of key heads, by layer, where it is not the model's


def split(
    name: str, d: Description, tables: Sequence[TableHeader], ranks: Ranks, way: Way
) -> tuple[Shard, ...]:
    """The shards of a model, one a rank. `name`: of its pack. Raises OptionError, UnsupportedError."""
    check(name, d, ranks.world, way)
    if way.cut == "layers":
        return _by_layers(name, d, ranks)
    if way.cut in UNCUT:
        return tuple(_all_of(d, rank, ranks.world) for rank in range(ranks.world))
    matrices = _Matrices(tables)
    rows, is_sum = matrices.step("gate_up", 0), way.cut == "sum"
    if d.ffn_width % rows:
        raise UnsupportedError(
            f"{name} has {d.ffn_width:,} neurons, its matrices are stored {rows} rows together, and gate and "
            "up lie in one: no cut between them is whole; pack it with --encoding int8"
        )
    step = lcm(rows, matrices.step("down", 1) if is_sum else 1)
    neurons = _shared(f"{name}: neurons", d.ffn_width, step, ranks)
    plain = Ranks(ranks.speeds)
    outputs = (
        () if is_sum else _shared(f"{name}: outputs", d.width, matrices.step("down", 0), plain)
    )
    by_heads = way.attention == "heads"
    fits = orders_fit(way.key_orders, d.num_layers, d.num_kv_heads)
    if not fits or (way.key_orders and not by_heads):
        raise UnsupportedError(
            f"{name}: orders of key heads are for attention=heads, all {d.num_kv_heads} of each of "
            f"{d.num_layers} layers; make the file again with `outsize adapt sync`"
        )
    keys = _key_heads(name, d, matrices, plain, way.key_ends) if by_heads else ()
    return tuple(_shard(d, rank, way, (neurons, outputs, keys)) for rank in range(ranks.world))


def check(name: str, d: Description, world: int, way: Way) -> None:
    """Raises OptionError, UnsupportedError for what cannot be cut."""
    if not 1 <= world <= MOST:
        raise OptionError(f"ranks is {world}; from 1 to {MOST} can share a model")
    if d.num_kv_layers < d.num_layers:
        raise UnsupportedError(
            f"the last {d.num_layers - d.num_kv_layers} layers of {name} share keys and values, which one "
            "process alone holds; leave --ranks out"
        )
    if d.has_states:
        raise UnsupportedError(
            f"{name} keeps states of sequences in place of some keys and values, which ranks do not share; "
            "run it on one"
        )
    if way.cut == "experts" and (d.mixture is None or d.is_nested):
        way_out = "relay" if d.mixture is not None else "tensor"
        raise OptionError(f"{name} has no experts to share out; use --parallel {way_out}")
    if way.cut == "experts" and d.mixture is not None and d.mixture.beside:
        raise UnsupportedError(
            f"{name} has a dense feed-forward beside its experts, which ranks do not share out; leave "
            "--ranks out"
        )
    if way.cut in UNCUT:
        return
    if d.mixture is not None and way.cut != "layers":
        what = "of nested experts" if d.is_nested else "a mixture of experts"
        ways = "relay" if d.is_nested else "experts, or relay"
        raise UnsupportedError(
            f"{name} is {what}, whose matrices are not cut; use --parallel {ways}"
        )
    if d.reads_tokens or len(d.forms) > 1 or d.value_norm or d.out_scale:
        raise UnsupportedError(
            f"{name} reads its tokens in every layer, or has layers of several sizes, which ranks do not "
            "share; leave --ranks out"
        )
    if d.layer_norm or d.positions or d.parallel or d.two_matrix:
        raise UnsupportedError(
            f"{name} is a {d.family} model, of LayerNorms and two-matrix feed-forwards, which ranks do not "
            "share; leave --ranks out"
        )
    if way.attention == "heads" and way.cut != "sum":
        raise OptionError(
            f"attention=heads gives each rank a part of a sum, and cut={way.cut} adds none; write cut=sum"
        )
    if way.attention == "heads" and (d.qk_norm_whole or d.latent is not None):
        what = (
            "norms all query heads as one" if d.qk_norm_whole else "shares one key among all heads"
        )
        raise UnsupportedError(
            f"{name} {what}, so its heads cannot be shared out; use attention=whole"
        )


class _Matrices:
    """A model's matrices of a name, in any layer."""

    def __init__(self, tables: Sequence[TableHeader]) -> None:
        self._tables = [t for t in tables if t.kind == "layers"]

    def step(self, name: str, axis: int) -> int:
        """What cuts along rows (0) or inputs (1) must be multiples of."""
        return lcm(*(_steps(m)[axis] for m in self._named(name)))

    def _named(self, name: str) -> Iterable[Matrix]:
        return (m for t in self._tables for m in t.tensors.get(name, ()))


def _steps(m: Matrix) -> tuple[int, int]:
    return encoding(m.encoding).step(m.width)


def _shared(what: str, total: int, step: int, ranks: Ranks) -> tuple[int, ...]:
    """Where each rank's part ends. Raises UnsupportedError where there are fewer steps than ranks."""
    units = [lcm(step, unit) for unit in UNITS] + [step]
    unit = next((u for u in units if -(-total // u) >= ranks.world), 0)
    if not unit:
        raise UnsupportedError(
            f"{what} are cut in steps of {step}, and {total:,} are fewer than {ranks.world} of these; use "
            "fewer ranks"
        )
    count = -(-total // unit)
    most = [None if m is None else max(1, m // unit) for m in ranks.most] or [None] * ranks.world
    ends = accumulate(parts(count, ranks.speeds, most))
    return tuple(min(total, end * unit) for end in ends)


def parts(count: int, speeds: Sequence[float], most: Sequence[int | None]) -> list[int]:
    """So many things, at least one each, in proportion to speeds (largest remainder), then those that are
    too many for a rank on to others that have room. Where nobody has, they stay."""
    found = _apportioned(count, speeds)

    def room(rank: int) -> float:
        limit = most[rank]
        return float("inf") if limit is None else limit - found[rank]

    while any(room(r) < 0 for r in range(len(found))):
        free = [r for r in range(len(found)) if room(r) > 0]
        if not free:
            break
        source = min(range(len(found)), key=room)
        to = max(free, key=lambda r: speeds[r] / (found[r] + 1))
        found[source], found[to] = found[source] - 1, found[to] + 1
    return found


def _apportioned(count: int, speeds: Sequence[float]) -> list[int]:
    """Largest remainders, with at least one each."""
    rest, total = count - len(speeds), sum(speeds)
    exact = [rest * speed / total for speed in speeds]
    found = [int(x) for x in exact]
    order = sorted(range(len(speeds)), key=lambda r: found[r] - exact[r])
    for r in order[: rest - sum(found)]:
        found[r] += 1
    return [1 + n for n in found]


def _key_heads(
    name: str, d: Description, matrices: _Matrices, ranks: Ranks, given: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """Key heads, with their query heads. Raises UnsupportedError where they do not divide."""
    group, step = d.num_heads // d.num_kv_heads * d.head_dim, matrices.step("o", 1)
    unit = lcm(group, step) // group
    row = matrices.step("qkv", 0)
    units = d.num_kv_heads // unit
    if d.num_kv_heads % unit or d.head_dim % row or units < ranks.world:
        raise UnsupportedError(
            f"{name} has {d.num_kv_heads} key heads, which {ranks.world} ranks cannot share out in groups of "
            f"{unit}; use attention=whole, or fewer ranks"
        )
    if given:
        if len(given) != ranks.world or given[-1] != d.num_kv_heads or any(e % unit for e in given):
            raise UnsupportedError(
                f"{name}: key heads that end at {given} are no cut of {d.num_kv_heads} for {ranks.world} "
                f"ranks in groups of {unit}; make the file again with `outsize adapt sync`"
            )
        return given
    ends = accumulate(parts(units, ranks.speeds, [None] * ranks.world))
    return tuple(end * unit for end in ends)


def key_unit(d: Description, tables: Sequence[TableHeader]) -> int:
    """Key heads that stay together, since the output map stores theirs together."""
    group = d.num_heads // d.num_kv_heads * d.head_dim
    return lcm(group, _Matrices(tables).step("o", 1)) // group


def _range(ends: Sequence[int], rank: int, whole: int) -> tuple[int, int]:
    return ((0, *ends)[rank], ends[rank]) if ends else (0, whole)


def _shard(
    d: Description,
    rank: int,
    way: Way,
    ends: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> Shard:
    neurons, outputs, keys = ends
    kv_heads, each = _range(keys, rank, d.num_kv_heads), d.num_heads // d.num_kv_heads
    return Shard(
        rank, len(neurons), way.cut, way.attention, _range(neurons, rank, d.ffn_width),
        _range(outputs, rank, d.width), (kv_heads[0] * each, kv_heads[1] * each), kv_heads, d.ffn_width,
        d.num_heads, d.num_kv_heads, neurons, outputs, (0, d.num_layers), d.num_layers, way.key_orders,
    )  # fmt: skip


def _all_of(d: Description, rank: int, world: int) -> Shard:
    """Nothing is cut."""
    whole = (0, d.ffn_width), (0, d.width), (0, d.num_heads), (0, d.num_kv_heads)
    sizes, layers = (d.ffn_width, d.num_heads, d.num_kv_heads), (0, d.num_layers)
    return Shard(rank, world, "whole", "whole", *whole, *sizes, (), (), layers, d.num_layers)


def _by_layers(name: str, d: Description, ranks: Ranks) -> tuple[Shard, ...]:
    """Layers in a row, by speed, then by memory. A token goes through one rank after the other, however they
    are shared out; of a prompt, which has hardly anything to do with the head, all have as long."""
    if d.num_layers < ranks.world:
        raise UnsupportedError(
            f"{name} has {d.num_layers} layers, fewer than {ranks.world} ranks; use fewer ranks"
        )
    most = [None if m is None else max(1, m) for m in ranks.most] or [None] * ranks.world
    ends = [*accumulate(parts(d.num_layers, ranks.speeds, most))]
    found = tuple(
        replace(_all_of(d, r, ranks.world), cut="layers", layers=(start, end))
        for r, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    )
    if d.mixture is not None and any(not {*range(*s.layers)} & {*d.routed} for s in found):
        raise UnsupportedError(
            f"{name} has experts in layers {d.routed[0]} to {d.routed[-1]}, and a rank would have none of "
            "these; use fewer ranks"
        )
    return found
