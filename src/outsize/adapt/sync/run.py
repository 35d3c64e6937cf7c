"""`outsize adapt sync`: measure which sums between ranks a model can do without, or in few bits; correct
those left out in closed form; choose for a link; measure the choice on text held out; write the add-on file,
unless it costs more than it may. What is measured is kept, and gone on from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, bfloat16

from outsize.adapt import checkpoints
from outsize.adapt.sparsity.words import Words, words
from outsize.adapt.sync import blockwise
from outsize.adapt.sync.blockwise import grouped
from outsize.adapt.sync.choose import (
    CORRECTED,
    DISTILLED,
    DROPPED,
    WHOLE,
    Layer,
    Rises,
    Times,
    bits_of,
    choose,
    cost_of,
    only,
)
from outsize.adapt.sync.journal import Journal
from outsize.adapt.sync.means import interval, mean_of, minus
from outsize.adapt.sync.ranks import Ranks, opened
from outsize.arguments import real, whole
from outsize.errors import AdapterError, OptionError
from outsize.home import home
from outsize.kernels.turned import BITS
from outsize.model_parts import Shard
from outsize.pack import fetch, sync_file
from outsize.pack.format import Pack
from outsize.pack.sync_file import KIND, VERSION, SyncAbout
from outsize.parallel import dropped, split
from outsize.parallel.dropped import Correction, Drop, Fit
from outsize.parallel.points import Points
from outsize.parallel.slow import parse_link
from outsize.plan.ranks import SOFTWARE_S
from outsize.progress import Progress, steps

AT_ONCE = 6  # layers whose corrections are fitted in one pass: each takes (2D + 1)^2 numbers a rank
TRIES = 6
HEADS = split.Way("sum", "heads")


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """What to measure, and what it may cost."""

    model: str
    data: tuple[Path, ...]
    output: Path | None = None  # None: beside the pack, where `drop=auto` finds it
    ranks: int = 2
    link: str = "100Mbit/s,0.1ms"
    gate: float = 1.0  # percent of perplexity that all together may cost
    rank: int = 64  # of corrections; 0: none
    tokens: int = 32768  # that are read of the data
    length: int = 512  # of a sequence, or the model's context
    sweep: int = 4  # sequences that each layer is dropped for
    distill: int = (
        0  # steps for the correction of each layer that is sensitive; 0: closed form alone
    )
    group: bool = False  # put key heads together that do best without the others
    allow: bool = False  # write what costs more
    resume: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if whole("ranks", self.ranks, 1, split.MOST) < 2:
            raise OptionError("ranks is 1: one rank has nobody to wait for; give --ranks 2 or more")
        real("gate", self.gate, 0.0, 1e6)
        whole("rank", self.rank, 0, sync_file.MOST_RANK)
        whole("tokens", self.tokens, 1, 1 << 30)
        whole("sweep", self.sweep, 1, 1 << 20)
        whole("distill", self.distill, 0, 1 << 20)
        if self.distill and not self.rank:
            raise OptionError(
                f"distill is {self.distill} steps of corrections, and --rank 0 has none"
            )
        whole("length", self.length, 8, 1 << 20)
        parse_link(self.link)


@dataclass(frozen=True, slots=True)
class Made:
    """The file, what was measured of each layer and place, and the table that is shown of it."""

    path: Path
    about: SyncAbout
    rises: Rises
    table: tuple[str, ...]


def run(options: SyncOptions) -> Made:
    """Raises OptionError, UnsupportedError, DataError, PackError, DiskFullError; AdapterError for what costs
    too much."""
    o = options
    pack = fetch.find(o.model) or fetch.pack(o.model, quiet=o.quiet)
    d = pack.description
    equal, way = split.Ranks((1.0,) * o.ranks), HEADS
    shards = split.split(pack.path.name, d, pack.tables, equal, way)
    dropped.check(0, mixture=d.mixture is not None, post_norm=d.post_norm, num_layers=d.num_layers)
    found = words(pack, o.data, o.tokens, o.length)
    path = o.output or pack.path.with_name(pack.path.name + sync_file.suffix(o.ranks))
    about = {
        "kind": KIND, "version": VERSION, "identity": pack.source.identity, "ranks": o.ranks,
        "data": found.fingerprint, "sweep": o.sweep, "rank": o.rank, "distill": o.distill,
        "group": o.group,
    }  # fmt: skip
    journal = Journal(path.with_name(path.name + ".checkpoint"), about)
    checkpoints.check(o.resume, journal.path)
    if o.resume:
        journal.resume()
    with steps(o.quiet) as draw:
        if o.group:
            way = replace(way, key_orders=grouped(pack, shards, found.ids_BT, draw))
            shards = split.split(pack.path.name, d, pack.tables, equal, way)
    with steps(o.quiet) as draw, opened(pack, shards, home()) as ranks:
        work = _Work(o, ranks, found, journal, draw)
        rises = work.rises()
        if o.distill:
            rises = work.distilled(rises, pack, shards)
        chosen = work.chosen(rises)
        made = work.measured(pack, chosen, shards)
        table = tuple(work.table(rises, chosen, made))
        change = 100 * (made.perplexity / made.perplexity_before - 1)
        if change > o.gate and not o.allow:
            raise AdapterError(
                f"what was chosen costs {change:.2f} % of perplexity on text held out, more than the "
                f"{o.gate:g} % of --gate; nothing was written; give --resume with a higher --gate or "
                f"--allow, or remove {journal.path} and give more --data"
            )
        checkpoints.save(path, work.tensors(chosen), made.to_json())
    journal.path.unlink(missing_ok=True)
    return Made(path, made, rises, table)


class _Work:
    """A run's parts."""

    def __init__(
        self, options: SyncOptions, ranks: Ranks, found: Words, journal: Journal, draw: Progress
    ) -> None:
        self._o, self._ranks, self._words = options, ranks, found
        self._journal, self._draw = journal, draw
        self._some = found.ids_BT[: options.sweep]
        self._checked = found.ids_BT[-max(options.sweep, len(found.ids_BT) // 4) :]
        link = parse_link(options.link)
        self._times = Times(link, SOFTWARE_S["auto"], ranks.width, options.ranks)
        self._corrections: dict[str, dict[int, list[Correction]]] = {CORRECTED: {}, DISTILLED: {}}
        self._num = 2 * ranks.layers + 2 * len(BITS) + TRIES + 4  # measurements, about

    def rises(self) -> Rises:
        """Every layer's and every place's."""
        layers = range(self._ranks.layers)
        plain = [self._rise(self._one(i, DROPPED)) for i in layers]
        self._fit()
        corrected = [math.inf for _ in layers]
        if self._o.rank:
            corrected = [self._rise(self._one(i, CORRECTED)) for i in layers]
        bits: dict[tuple[str, int], float] = {}
        for b in BITS:
            bits["attention", b] = self._rise([Layer("", b, WHOLE)] * len(layers)) / len(layers)
            bits["ffn", b] = self._rise([Layer("", WHOLE, b)] * len(layers)) / len(layers)
        return Rises(plain, corrected, bits)

    def distilled(self, rises: Rises, pack: Pack, shards: Sequence[Shard]) -> Rises:
        """With what block-to-block distillation makes of layers that cost more than their part."""
        part = math.log1p(self._o.gate / 100) / self._ranks.layers
        made, found = self._corrections[DISTILLED], [math.inf] * self._ranks.layers
        begun = {i: c for i, c in self._corrections[CORRECTED].items() if rises.best(i)[1] > part}
        how = self._o.distill, self._draw
        made |= blockwise.distilled(pack, shards, self._words.ids_BT, begun, how)
        for i in made:
            found[i] = self._rise(self._one(i, DISTILLED))
        return replace(rises, distilled=found)

    def _one(self, layer: int, drop: str) -> list[Layer]:
        """One layer dropped, and no other."""
        whole_ = [Layer()] * self._ranks.layers
        return [*whole_[:layer], Layer(drop), *whole_[layer + 1 :]]

    def _rise(self, chosen: Sequence[Layer]) -> float:
        return self._risen("sweep", self._some, chosen)

    def _risen(self, what: str, ids_BT: Tensor, chosen: Sequence[Layer]) -> float:
        """Of the loss on some text, against all sums."""
        base = self._losses(what, ids_BT, [Layer()] * len(chosen))
        return mean_of(minus(self._losses(what, ids_BT, chosen), base))

    def chosen(self, rises: Rises) -> list[Layer]:
        """What takes the least time within the gate, all layers together, on text that the sweep did not
        see. Where what costs little alone costs too much together however little it may cost, as many layers
        of it, those first that cost least, as fit."""
        most = budget = math.log1p(self._o.gate / 100)
        found = [Layer()] * self._ranks.layers
        for _ in range(TRIES):
            found = choose(rises, self._times, most)
            rise = self._checked_rise(found)
            if rise <= budget:
                return found
            most *= max(0.3, 0.9 * budget / rise)
        order = sorted(range(len(found)), key=lambda i: cost_of(rises, i, found[i]))
        fits, too_many = 0, len(order)
        while too_many - fits > 1:
            count = (fits + too_many) // 2
            rise = self._checked_rise(only(found, order[:count]))
            fits, too_many = (count, too_many) if rise <= budget else (fits, count)
        return only(found, order[:fits])

    def _checked_rise(self, chosen: Sequence[Layer]) -> float:
        return self._risen("check", self._checked, chosen)

    def measured(self, pack: Pack, chosen: Sequence[Layer], shards: Sequence[Shard]) -> SyncAbout:
        """What the choice costs on text held out, and what the file says of it."""
        text_BT = self._words.held_out_BT
        before = self._losses("held out", text_BT, [Layer()] * len(chosen))
        after = self._losses("held out", text_BT, chosen)
        low, high = interval(minus(after, before))
        o, layers = self._o, list(enumerate(chosen))
        return SyncAbout(
            KIND, VERSION, pack.source.identity, pack.source.layout,
            tuple(s.kv_heads[1] for s in shards),
            tuple(i for i, way in layers if way.drop), bits_of(chosen),
            tuple(i for i, way in layers if way.drop in (CORRECTED, DISTILLED)), max(1, o.rank), o.link,
            len(chosen) * self._times.seconds(Layer()), sum(map(self._times.seconds, chosen)),
            text_BT.shape[0] * (text_BT.shape[1] - 1), math.exp(mean_of(before)), math.exp(mean_of(after)),
            100 * math.expm1(low), 100 * math.expm1(high), self._words.text[:80], shards[0].orders,
        )  # fmt: skip

    def tensors(self, chosen: Sequence[Layer]) -> dict[str, Tensor]:
        """The corrections that are used."""
        made: dict[str, Tensor] = {}
        for layer, way in enumerate(chosen):
            for rank, correction in enumerate(self._corrections.get(way.drop, {}).get(layer, ())):
                made[f"{layer}.{rank}.first"] = correction.first.to(bfloat16)
                made[f"{layer}.{rank}.second"] = correction.second.to(bfloat16)
        return made

    def table(self, rises: Rises, chosen: Sequence[Layer], about: SyncAbout) -> list[str]:
        learnt = f"{'distilled':>11}" if rises.distilled else ""
        head = f"{'layer':>6}{'dropped':>10}{'corrected':>11}{learnt}"
        rows = [f"{head}   chosen  (rise of the loss, nats)"]
        for i, way in enumerate(chosen):
            what = way.drop or f"attention {way.attention} bits"
            learnt = f"{rises.distilled[i]:>11.5f}" if rises.distilled else ""
            rows.append(
                f"{i:>6}{rises.dropped[i]:>10.5f}{rises.corrected[i]:>11.5f}{learnt}   {what}, "
                f"{'one sum' if way.drop else 'feed-forward'} {way.ffn} bits"
            )
        rows += [
            f"all sums after {p} in {b} bits: {n * len(chosen):+.5f}"
            for (p, b), n in rises.bits.items()
        ]
        rows.append(
            f"{len(about.dropped)} of {len(chosen)} layers dropped; a token waits {1e3 * about.wire:.2f} ms "
            f"for a link of {about.link}, {1e3 * about.wire_before:.2f} with 16-bit sums"
        )
        return [*rows, about.cost]

    def _losses(self, what: str, ids_BT: Tensor, chosen: Sequence[Layer]) -> list[float]:
        def measure() -> list[float]:
            self._draw(what, len(self._journal.known), self._num)
            return self._ranks.losses(ids_BT, partial(self._points, chosen))

        return self._journal.get(f"{what} {json.dumps(chosen)}", measure)

    def _fit(self) -> None:
        """Every layer's corrections, some layers a pass; in bf16, as they are stored."""
        layers, text_BT = list(range(self._ranks.layers)), self._words.ids_BT
        for at in range(0, len(layers) if self._o.rank else 0, AT_ONCE):
            some = layers[at : at + AT_ONCE]
            found = list[Fit]()
            for number, found in enumerate(self._ranks.fit(text_BT, some)):  # noqa: B007
                self._draw(f"fit layers {some[0]} to {some[-1]}", number, len(text_BT))
            world = len(self._ranks.all)
            for i, layer in enumerate(some):
                solved = [fit.solve(self._o.rank) for fit in found[i * world : (i + 1) * world]]
                self._corrections[CORRECTED][layer] = [blockwise.stored(c) for c in solved]

    def _points(self, chosen: Sequence[Layer], rank: int) -> Points:
        layers = [i for i, way in enumerate(chosen) if way.drop]
        made = {
            i: self._corrections[way.drop][i][rank]
            for i, way in enumerate(chosen)
            if way.drop in self._corrections
        }
        return Points(Drop(frozenset(layers), made), bits_of(chosen))
