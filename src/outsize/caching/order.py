"""Which id comes first: in queues, or by a priority that changes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, MutableMapping
from heapq import heapify, heappop, heappush

Key = tuple[int, ...]


def take_first(queues: Iterable[MutableMapping[int, None]], staying: Collection[int]) -> int:
    """Remove and return the first id not in `staying`, of the first queue that has one."""
    for queue in queues:
        for id in queue:
            if id not in staying:
                del queue[id]
                return id
    raise AssertionError("more ids stay than there are slots")


class Order:
    """A priority queue of ids, the smallest key first: a heap whose outdated entries are skipped."""

    def __init__(self) -> None:
        self._key: dict[int, Key] = {}
        self._heap: list[tuple[Key, int]] = []

    def set(self, id: int, key: Key) -> None:
        self._key[id] = key
        heappush(self._heap, (key, id))
        if len(self._heap) > 64 + 4 * len(self._key):
            self._heap = [(k, i) for i, k in self._key.items()]
            heapify(self._heap)

    def pop(self, staying: Collection[int]) -> int:
        """Remove and return the first id not in `staying`."""
        skipped = []
        while True:
            key, id = heappop(self._heap)
            if self._key.get(id) != key:
                continue
            if id not in staying:
                break
            skipped.append((key, id))
        for entry in skipped:
            heappush(self._heap, entry)
        del self._key[id]
        return id
