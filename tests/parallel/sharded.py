"""Opens a model's shards as ranks of one process, a thread and a backend each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from outsize.engine.ranks.how import joined
from outsize.home import home
from outsize.kernels.backend import Backend
from outsize.kernels.find import native_in
from outsize.kernels.plain import PLAIN
from outsize.model.transformer import Transformer
from outsize.model_parts import Shard
from outsize.pack.format import Pack
from outsize.parallel.points import Points
from outsize.parallel.shard import cut
from outsize.parallel.spec import ParallelSpec
from outsize.parallel.split import Ranks, Way, split
from outsize.parallel.transport import Transport, threads
from outsize.weights import load as weights
from outsize.weights.open_pack import LoadPlan
from tests.parallel.ranks import on_all

T = TypeVar("T")
Plan = Callable[[Pack], LoadPlan]


def backend(native: bool) -> Backend:
    """One for each rank: its scratch is its own."""
    return (native_in(home() / "native") if native else None) or PLAIN


def shards_of(pack: Pack, speeds: Sequence[float], way: Way) -> list[Pack]:
    shards = split(pack.path.name, pack.description, pack.tables, Ranks(tuple(speeds)), way)
    folder = Path(home())
    return [cut(pack, shard, folder) for shard in shards]


class Rank:
    """A shard's model, open."""

    def __init__(
        self, pack: Pack, how: tuple[bool, Points, str], transport: Transport, plan: LoadPlan | None
    ) -> None:
        (native, points, uncut), self.number = how, transport.rank
        own = backend(native)
        self.pack, self.loaded = pack, weights.load(pack, own, plan)
        shard = pack.description.shard
        way = Way(uncut) if shard is None else Way(shard.cut, shard.attention)
        ranks, relay = joined(ParallelSpec(way), transport, own, points)
        self.ranks = ranks
        self.model = Transformer(pack.description, self.loaded, own, ranks=ranks)
        self.model.relay = relay

    @property
    def shard(self) -> Shard:
        assert self.pack.description.shard is not None
        return self.pack.description.shard


@contextmanager
def opened(
    packs: Sequence[Pack],
    native: bool = True,
    plan: Plan | None = None,
    transports: Sequence[Transport] | None = None,
    points: Callable[[int], Points] = lambda _: Points(),
    uncut: str = "whole",
) -> Iterator[Callable[[Callable[[Rank], T]], list[T]]]:
    """Gives what runs a function on every rank, a thread each. `points`: of each rank's sums;
    `uncut`: the way, where packs are the model's own."""
    found = list(transports or threads(len(packs)))
    ranks = [
        Rank(pack, (native, points(t.rank), uncut), t, None if plan is None else plan(pack))
        for pack, t in zip(packs, found, strict=True)
    ]

    def run(what: Callable[[Rank], T]) -> list[T]:
        return on_all(found, lambda transport: what(ranks[transport.rank]))

    try:
        yield run
    finally:
        for rank in ranks:
            rank.loaded.close()
