"""Keys and values with the tokens that they were computed from, so that a shared prefix is not run again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from outsize.kv.kv import KV


@dataclass(slots=True, eq=False, weakref_slot=True)
class CachedPrefix:
    """A cache and the tokens it was computed from."""

    kv: KV
    tokens: list[int] = field(default_factory=list)
    way: Hashable = None  # that it was computed in: by which adapter, ...
    exact: int = 0  # leading tokens that were computed as a prompt's are, in whole chunks

    def shared(self, ids: Sequence[int], way: Hashable = None) -> int:
        """How many leading tokens need not be run again; the last always is."""
        if way != self.way or self.kv.torn:
            self.tokens, self.way = [], way
        count = self.kv.reachable(common(self.tokens, ids[:-1]))
        self.tokens = self.tokens[:count]  # the others' entries are about to be written over
        self.exact = min(self.exact, count)
        return count


def common(ours: Sequence[object], theirs: Sequence[object]) -> int:
    """How many items two sequences share from their beginnings."""
    count = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        count += 1
    return count
