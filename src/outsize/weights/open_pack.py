"""An open pack: its tables, reading threads and I/O statistics, and the plan of what stays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from outsize.kernels.backend import Backend
from outsize.pack.format import Pack
from outsize.pack.tables import TableHeader
from outsize.progress import Progress
from outsize.storage.reader import Reader
from outsize.storage.stats import IOStats
from outsize.storage.table import Table
from outsize.weights.bundles import Bundles
from outsize.weights.residency import RecordCache, Share, Shares, all_of
from outsize.weights.spec import ExpertOptions


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How a pack is loaded. The defaults: fully resident, every record checked when it is first read."""

    shares: Shares = field(default_factory=dict)  # a table that is not named is fully resident
    verify: str = "first"
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    copies: Pack | None = None  # the same model at fewer bits, for experts that are missing
    neurons: tuple[Bundles, str] | None = None  # paged neurons, and their eviction policy


class OpenPack:
    """What the loaders of table kinds share; close it."""

    def __init__(self, pack: Pack, backend: Backend, plan: LoadPlan, progress: Progress) -> None:
        self.pack, self.plan, self.reader = pack, plan, Reader(backend=backend)
        self.stats, self.expert_stats = IOStats(), IOStats()
        self.tables: list[Table] = []
        self.caches: list[RecordCache] = []
        self._progress, self._num_read = progress, 0
        self._total = sum(_num_loaded(t, self._share(t)) * t.stride for t in pack.tables)

    def open(self, kind: str, stats: IOStats) -> Iterator[tuple[Table, Share]]:
        """The tables of a kind, and what of each stays in memory."""
        for header in self.pack.tables:
            if header.kind == kind:
                yield self.open_table(self.pack, header, stats), self._share(header)

    def open_table(self, pack: Pack, header: TableHeader, stats: IOStats) -> Table:
        """One table, also of another pack. Raises ReadError."""
        table = Table(pack.path, header, stats, self.plan.verify)
        self.tables.append(table)
        return table

    def _share(self, header: TableHeader) -> Share:
        return self.plan.shares.get(header.name, all_of(header))

    def on_read(self, size: int) -> None:
        """Progress callback: so many bytes more are in memory."""
        self._num_read += size
        self._progress("loading", self._num_read, self._total)

    def close(self) -> None:
        """End the threads and close the files. Nothing is being read once the reader is closed, so that
        buffers may go."""
        self.reader.close()
        for table in self.tables:
            table.close()


def _num_loaded(header: TableHeader, share: Share) -> int:
    """Records that are read when a model is opened."""
    if header.kind == "tokens" or share.ring == len(header.keys):
        return min(share.ring, len(header.keys))
    return len(share.pinned)
