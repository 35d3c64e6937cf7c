"""A kind of table: what its records are, how a checkpoint's tensors become them, what a pack's must hold, and
in which order they are worth memory.

One file of this folder each, found by its name, which is also what a pack's header says; `rows.py` is the
plainest. How its records are fetched is in the file of the same name in weights/.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import outsize.pack.kinds as package
from outsize import registry
from outsize.model_config import Description
from outsize.pack.records import Specs
from outsize.pack.tables import TableHeader
from outsize.pack.tensors import SourceTensors, TablePlan


@dataclass(frozen=True, slots=True)
class Group:
    """Tables of one kind whose records hold the same tensors, each in other encodings: attn-0, attn-1."""

    name: str  # what the tables' names begin with
    place: int  # where they stand among the tables of a pack
    specs: Specs  # the tensors of a record


class Kind(ABC):
    """Law: what `plan` makes of a sound checkpoint has no `fault`."""

    from_front = False  # are records held from the first one on, without holes?
    routed = False  # named as the model runs: they share slots, none stays for good

    @abstractmethod
    def groups(self, d: Description) -> Sequence[Group]:
        """The tables of this kind that such a model has."""

    @abstractmethod
    def plan(self, group: Group, tensors: SourceTensors) -> list[TablePlan]:
        """A group's tables, from a checkpoint's headers. Raises CheckpointError, UnsupportedError."""

    @abstractmethod
    def fault(self, d: Description, group: Group, tables: Sequence[TableHeader]) -> str:
        """What is wrong with a pack's tables of a group, in a clause; "" if nothing is."""

    def order(
        self, d: Description, tables: Sequence[TableHeader]
    ) -> Iterator[tuple[int, str, int]]:
        """(rank, table, record) of what is worth holding, the best first; lower ranks go before higher ones
        of any kind. None of what is routed: which are used is not known before."""
        yield from ()

    def least_slots(self, d: Description, table: TableHeader) -> int:
        """Slots without which nothing runs, of what is routed."""
        return 0

    def most_slots(self, d: Description, table: TableHeader) -> int:
        """Slots beyond which more are of no use, of what is routed."""
        return len(table.keys)


@cache
def kinds() -> Mapping[str, Kind]:
    """Every kind of table, by name."""
    known = [name for name in registry.names(package) if name != "kind"]
    return {name: registry.module(package, name, "table kind", known).KIND for name in known}


def groups(d: Description) -> list[tuple[Kind, Group]]:
    """The groups of tables that a model's pack has, in the order of its tables."""
    found = [(kind, group) for kind in kinds().values() for group in kind.groups(d)]
    return sorted(found, key=lambda pair: pair[1].place)
