"""A model's ranks within one process, a thread each, by the engine that runs them apart: losses under any
choice of sums, and what each rank's parts of attention are.

Shapes: B sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from outsize.forward.full import hidden
from outsize.forward.span import Span
from outsize.kernels.backend import Backend
from outsize.kernels.find import find
from outsize.kernels.turned import BITS, turner
from outsize.model.dropped import SummedAttention
from outsize.model.paged import PagedLayer
from outsize.model.ranks import Chunk, Wanted
from outsize.model.transformer import Transformer
from outsize.model_parts import Shard
from outsize.pack.format import Pack
from outsize.parallel.collective import Pending, Point, Ready
from outsize.parallel.dropped import Drop, Fit
from outsize.parallel.exact import Exact
from outsize.parallel.lowbit import LowBit, Turned
from outsize.parallel.points import Points
from outsize.parallel.shard import cut
from outsize.parallel.transport import Threads, threads
from outsize.weights import load as weights

ROWS = 64  # logits computed at once
Choice = Callable[[int], Points]  # of a rank


class Sums:
    """A Collective whose points may change between passes, and whose exact sums may be looked at."""

    def __init__(self, transport: Threads, backend: Backend) -> None:
        self.rank, self.world, self.points = transport.rank, transport.world, Points()
        self._exact = Exact(transport)
        codecs = {bits: Turned(turner(bits, backend)) for bits in BITS}
        self._short = LowBit(self._exact, lambda at: codecs.get(self.points.at(at)))
        self.seen: Callable[[Tensor, Tensor, Point], None] | None = None  # part, sum, where

    @property
    def drop(self) -> Drop:
        return self.points.drop

    def sum(self, part_TD: Tensor, at: Point) -> Pending:
        if self.seen is None:
            return self._short.sum(part_TD, at)
        whole_TD = self._short.sum(part_TD, at).wait()
        self.seen(part_TD, whole_TD, at)
        return Ready(whole_TD)

    def gather(self, part_TN: Tensor, at: Point, widths: Sequence[int]) -> Pending:
        return self._exact.gather(part_TN, at, widths)


class Rank:
    """One of them."""

    def __init__(self, pack: Pack, transport: Threads) -> None:
        backend = find()  # of its own: so is a backend's scratch
        self.number, self.sums = transport.rank, Sums(transport, backend)
        self.loaded = weights.load(pack, backend)
        self.model = Transformer(pack.description, self.loaded, backend, ranks=self.sums)

    def loss(self, ids: Sequence[int]) -> float:
        """Mean, of the tokens after the first; of the leader alone."""
        model = self.model
        (h_TD,) = hidden(model, [(Span(0, ids[:-1], 0), model.new_kv(len(ids)))])
        if self.number:
            return 0.0
        total, target = 0.0, torch.tensor(ids[1:], dtype=torch.int64, device="cpu")
        for at in range(0, len(h_TD), ROWS):
            logits, due = model.logits(h_TD[at : at + ROWS]), target[at : at + ROWS]
            total += float(cross_entropy(logits, due, reduction="sum"))
        return total / len(h_TD)


class Ranks:
    """All of them; `opened` gives one."""

    def __init__(self, ranks: Sequence[Rank], transports: Sequence[Threads]) -> None:
        self.all, self._transports = ranks, transports
        self.layers = ranks[0].model.description.num_layers
        self.width = ranks[0].model.description.width

    def losses(self, ids_BT: Tensor, choice: Choice) -> list[float]:
        """Of each sequence."""
        for rank in self.all:
            rank.sums.points = choice(rank.number)
        return [self._loss(ids) for ids in ids_BT.tolist()]

    def fit(self, ids_BT: Tensor, layers: Sequence[int]) -> Iterator[list[Fit]]:
        """For each sequence: by layer and rank, what is known by then of the others' parts of attention, from
        each rank's and what attention read, with all sums as they are."""
        fits = {layer: [Fit(self.width) for _ in self.all] for layer in layers}
        for rank in self.all:
            rank.sums.points = Points()
            rank.model.relay = _Fitting(rank, {i: fits[i][rank.number] for i in layers})
        try:
            for ids in ids_BT.tolist():
                self._loss(ids)
                yield [fit for layer in layers for fit in fits[layer]]
        finally:
            for rank in self.all:
                rank.model.relay, rank.sums.seen = None, None

    def _loss(self, ids: Sequence[int]) -> float:
        """Of one sequence, run by all ranks."""

        def one(rank: Rank) -> float:
            try:
                with torch.inference_mode():
                    return rank.loss(ids)
            except BaseException:
                self._transports[rank.number].close()  # the others would wait
                raise

        with ThreadPoolExecutor(len(self.all)) as pool:
            first, *_ = [f.result() for f in [pool.submit(one, rank) for rank in self.all]]
            return first


@contextmanager
def opened(pack: Pack, shards: Sequence[Shard], home: Path) -> Iterator[Ranks]:
    """The ranks of a model, all held in memory."""
    transports = threads(len(shards))
    packs, ranks = [cut(pack, shard, home) for shard in shards], list[Rank]()
    try:
        for made, transport in zip(packs, transports, strict=True):
            ranks.append(Rank(made, transport))
        yield Ranks(ranks, transports)
    finally:
        for rank in ranks:
            rank.loaded.close()


class _Fitting:
    """A model's `Stages` that runs all layers here, and shows a rank's parts of some to what is fitted."""

    begins = True

    def __init__(self, rank: Rank, fits: dict[int, Fit]) -> None:
        self._rank, self._fits = rank, fits

    def run(self, layers: Sequence[PagedLayer], chunks: Sequence[Chunk], _wanted: Wanted) -> None:
        for number, layer in enumerate(layers):
            fit = self._fits.get(number // 2) if number % 2 == 0 else None
            half = layer.resident
            if fit is None or not isinstance(half, SummedAttention):
                layer(chunks)
                continue
            for chunk in chunks:  # one after another: each part belongs to what was read for it
                normed_TD = half.half.entering(*chunk)
                self._rank.sums.seen = _seen(fit, normed_TD)
                layer([chunk])
            self._rank.sums.seen = None


def _seen(fit: Fit, normed_TD: Tensor) -> Callable[[Tensor, Tensor, Point], None]:
    def see(part_TD: Tensor, whole_TD: Tensor, at: Point) -> None:
        fit.add(normed_TD, part_TD, whole_TD - part_TD.float())

    return see
