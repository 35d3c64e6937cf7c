"""Which records are in which slots: the protocol, and the bookkeeping that policies share.

A policy knows integers only. A policy is a file in `eviction/`: the file name is its name, its function
`policy(capacity, hints)` makes one.
Law: slots distinct; an id asked for now is never evicted now; hits never above Belady's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from outsize import registry
from outsize.caching import eviction
from outsize.errors import CapacityError


class Placed(NamedTuple):
    """Each distinct id's slot, in the order asked; and those (id, slot) that must be read."""

    slots: dict[int, int]
    loads: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Hints:
    """What some policies want to know beforehand."""

    pinned: Sequence[int] = ()  # never to be evicted
    future: Sequence[Sequence[int]] = ()  # every request to come, in order
    ranked: Sequence[int] = ()  # by how often they were used in a profile, the most used first
    per_layer: int = 64  # id // per_layer is the layer, and layers are visited in order
    layers: int = 1


class Policy(Protocol):
    """Decides which ids occupy `capacity` slots."""

    @property
    def room(self) -> int:
        """So many ids at once always fit."""
        ...

    def place(self, ids: Sequence[int], keep: Collection[int] = (), ahead: bool = False) -> Placed:
        """Make room for these ids, without evicting `keep`; `ahead`: they are only expected. Raises
        CapacityError, changing nothing."""
        ...

    def adopt(self, slots: Mapping[int, int]) -> None:
        """A new policy takes over: these ids are in these slots."""
        ...

    def give_up(self, least: int) -> tuple[int, int | None] | None:
        """Use a slot no longer, and which: one that is empty, or else of the least worth; with the id that
        was in it. None where no more than `least` are left."""
        ...

    def begin_pass(self) -> None:
        """The layers are visited from the first one on again."""
        ...

    def observe(self, layer: int, rows: Sequence[Sequence[int]]) -> None:
        """What each token, in order, asks for in this layer; told before it is placed."""
        ...

    def settle(self) -> None:
        """What a layer asked for is being read: the time for long thoughts."""
        ...


class Slots(ABC):
    """The bookkeeping: a subclass hears of every use and names the victims."""

    def __init__(self, capacity: int) -> None:
        self.slot_of: dict[int, int] = {}
        self.is_ahead = False  # what is being placed is only expected
        self._free = list(range(capacity))[::-1]
        self._capacity = capacity

    @property
    def room(self) -> int:
        return self._capacity

    def adopt(self, slots: Mapping[int, int]) -> None:
        taken = set(slots.values())
        self._free = [slot for slot in self._free if slot not in taken]
        for id, slot in slots.items():
            self.slot_of[id] = slot
            self.used(id, False)

    def give_up(self, least: int) -> tuple[int, int | None] | None:
        if self._capacity <= least:
            return None
        self._capacity -= 1
        if self._free:
            return self._free.pop(), None
        id = self.victim(())
        return self.slot_of.pop(id), id

    def begin_pass(self) -> None:  # noqa: B027  most do not care
        """A new pass over the layers."""

    def observe(self, layer: int, rows: Sequence[Sequence[int]]) -> None:  # noqa: B027
        """What is asked for next."""

    def settle(self) -> None:  # noqa: B027
        """A layer's requests are on their way."""

    @abstractmethod
    def used(self, id: int, is_hit: bool) -> None:
        """An id was asked for."""

    @abstractmethod
    def victim(self, staying: Collection[int]) -> int:
        """A resident id to evict, not one of those."""

    def place(self, ids: Sequence[int], keep: Collection[int] = (), ahead: bool = False) -> Placed:
        self.is_ahead, wanted = ahead, dict.fromkeys(ids)
        staying = wanted.keys() | {i for i in keep if i in self.slot_of}
        if len(staying) > self._capacity:
            raise too_many(len(staying), self._capacity)
        hits = [i for i in wanted if i in self.slot_of]
        for i in hits:
            self.used(i, True)
        loads = [(i, self._take(staying)) for i in wanted if i not in self.slot_of]
        for i, slot in loads:
            self.slot_of[i] = slot
            self.used(i, False)
        return Placed({i: self.slot_of[i] for i in wanted}, loads)

    def _take(self, staying: Collection[int]) -> int:
        return self._free.pop() if self._free else self.slot_of.pop(self.victim(staying))


def too_many(wanted: int, capacity: int) -> CapacityError:
    return CapacityError(
        f"{wanted} records are wanted at once, there are slots for {capacity}; give more --memory"
    )


def make(name: str, capacity: int, hints: Hints) -> Policy:
    """A policy by name. Raises UnsupportedError with a suggestion."""
    found = registry.module(eviction, name, "policy", registry.names(eviction))
    made: Policy = found.policy(capacity, hints)
    return made
