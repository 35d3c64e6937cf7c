"""Where weights live. `Resident`: all of a table, held. `Cached`: slots, a policy, and reads ahead.

Law: what `fetch` gives is what a fully resident table gives, bit for bit, for any trace and any
capacity that holds the request (tests/laws/test_residency.py). Ids are record numbers of the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from outsize.caching.eviction.pin_and_ring import PinAndRing
from outsize.kernels.backend import Backend
from outsize.storage.reader import Reader
from outsize.storage.stats import IOStats
from outsize.storage.table import Table, Weights
from outsize.weights.cached import Cached, Tick


class Residency(Protocol):
    """Records in fast memory, by id."""

    traffic: IOStats

    def fetch(self, ids: Sequence[int]) -> list[Weights]:
        """All of these at once, valid until `release`. Raises CapacityError, PackError, ReadError."""
        ...

    def release(self) -> None:
        """What was fetched has been used."""
        ...

    def stream(self, ids: Sequence[int]) -> Iterator[list[tuple[int, Weights]]]:
        """The same, a few at a time as they are there: those in memory first."""
        ...

    def prefetch(self, ids: Sequence[int]) -> None:
        """Read ahead as many as can be, in this order."""
        ...


class Resident:
    """Every record, read at once; the plain twin."""

    def __init__(self, table: Table, reader: Reader, backend: Backend, tick: Tick) -> None:
        self.traffic = table.traffic
        ids = range(len(table))
        made = Cached(table, reader, backend, len(table), PinAndRing(len(table), ids))
        self._weights = made.load(ids, tick)

    def fetch(self, ids: Sequence[int]) -> list[Weights]:
        return [self._weights[i] for i in ids]

    def release(self) -> None:
        """Nothing to do."""

    def stream(self, ids: Sequence[int]) -> Iterator[list[tuple[int, Weights]]]:
        yield [(i, self._weights[i]) for i in ids]

    def prefetch(self, ids: Sequence[int]) -> None:
        """Nothing to do."""
