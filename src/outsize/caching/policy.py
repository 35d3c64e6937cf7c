"""Cache policies: which records are in which slots, and which one is evicted for another.

A policy knows integers only. It is a file in `eviction/`: the file name is its name, and `policy(capacity,
hints)` in it makes one.
Law: slots distinct; an id asked for now is never evicted now; hits never above Belady's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from outsize import registry
from outsize.caching import eviction
from outsize.errors import CapacityError


class Placed(NamedTuple):
    """Where a request's records go."""

    slots: dict[int, int]  # each distinct id's slot, in the order asked
    loads: list[tuple[int, int]]  # those (id, slot) that must be read


@dataclass(frozen=True, slots=True)
class Hints:
    """What some policies need to know beforehand."""

    pinned: Sequence[int] = ()  # never to be evicted
    future: Sequence[Sequence[int]] = ()  # every request to come, in order
    ranked: Sequence[int] = ()  # by how often they were used in a profile, the most used first
    per_layer: int = 64  # id // per_layer is the layer, and layers are visited in order
    layers: int = 1


class Policy(ABC):
    """Decides which ids are in `capacity` slots. `joins`: ids side by side are used together, so that one
    read may fetch them all."""

    joins = False

    @property
    @abstractmethod
    def room(self) -> int:
        """So many ids at once always fit."""

    @abstractmethod
    def place(self, ids: Sequence[int], keep: Collection[int] = (), ahead: bool = False) -> Placed:
        """Make room for these ids, without evicting `keep`; `ahead`: they are prefetched, not asked for.
        Raises CapacityError, changing nothing."""

    @abstractmethod
    def adopt(self, slots: Mapping[int, int]) -> None:
        """Start from these ids (keys) in these slots; called once, on a new policy."""

    @abstractmethod
    def drop_slot(self, least: int) -> tuple[int, int | None] | None:
        """Use one slot no longer: an empty one, or else that of least worth. Returns it, with the id that was
        in it; None if no more than `least` are left."""

    def lengthen(self, slots: Sequence[int]) -> list[int]:
        """Use these slots, too, as long as they are lent; ids that are forgotten for that. A policy that
        cannot leaves them empty."""
        return []

    def shorten(self, slots: Sequence[int]) -> list[int]:
        """The end of it: the ids that were in them."""
        return []

    def begin_pass(self) -> None:  # noqa: B027  most do not care
        """The layers are visited from the first one on again."""

    def observe(self, layer: int, rows: Sequence[Sequence[int]]) -> None:  # noqa: B027
        """What each token, in order, asks for in this layer; called before it is placed."""

    def finish_ranking(self) -> None:  # noqa: B027
        """A layer's requests are being read: there is time for a slow ranking of the next victims."""


class EvictionPolicy(Policy):
    """Keeps the slots, all alike; a subclass is notified of every use and names the victims."""

    def __init__(self, capacity: int, hints: Hints) -> None:
        self.slot_of: dict[int, int] = {}
        self.is_ahead = False  # what is being placed is prefetched
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
            self.used(id)

    def drop_slot(self, least: int) -> tuple[int, int | None] | None:
        if self._capacity <= least:
            return None
        self._capacity -= 1
        if self._free:
            return self._free.pop(), None
        id = self.victim(())
        return self.slot_of.pop(id), id

    @abstractmethod
    def used(self, id: int) -> None:
        """An id was asked for, or prefetched; it is resident now."""

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
            self.used(i)
        loads = [(i, self._take(staying)) for i in wanted if i not in self.slot_of]
        for i, slot in loads:
            self.slot_of[i] = slot
            self.used(i)
        return Placed({i: self.slot_of[i] for i in wanted}, loads)

    def _take(self, staying: Collection[int]) -> int:
        return self._free.pop() if self._free else self.slot_of.pop(self.victim(staying))


def too_many(wanted: int, capacity: int) -> CapacityError:
    return CapacityError(
        f"{wanted} records are wanted at once, there are slots for {capacity}; give more --memory"
    )


def make(name: str, capacity: int, hints: Hints) -> Policy:
    """A policy by name. Raises UnsupportedError with a suggestion."""
    found = registry.module(eviction, name, "policy")
    made: Policy = found.policy(capacity, hints)
    return made
