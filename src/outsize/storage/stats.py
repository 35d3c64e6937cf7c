"""I/O statistics: cache hits and misses, bytes read, seconds waited."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields


@dataclass(slots=True)
class IOStats:
    """Counters of the tables that share it, since the model was opened. Bytes and seconds."""

    bytes_read: int = 0
    hits: int = 0  # records that were in memory when asked for
    misses: int = 0  # records that had to be read, ahead of time or not: the sum of the next five
    ready: int = 0  # read ahead, and there when asked for
    late: int = 0  # read ahead, and still on its way
    cold: int = 0  # never there before
    collision: int = 0  # evicted in the very pass that asks for it
    capacity: int = 0  # evicted in an earlier pass
    dropped: int = 0  # asked for, and left out (lossy)
    substituted: int = 0  # asked for, and replaced by another (lossy)
    copied: int = 0  # asked for, and replaced by its copy at fewer bits (lossy)
    bytes_demanded: int = 0  # read because they were asked for
    bytes_useful: int = 0  # read ahead, and then asked for
    bytes_wasted: int = 0  # read ahead in vain
    requests: int = (
        0  # reads that the system was asked for: a record may take several, or several one
    )
    waited_s: float = 0.0  # the computation stood still for reads
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __add__(self, other: IOStats) -> IOStats:
        return _from_numbers([x + y for x, y in zip(self.numbers(), other.numbers(), strict=True)])

    def __sub__(self, other: IOStats) -> IOStats:
        return _from_numbers([x - y for x, y in zip(self.numbers(), other.numbers(), strict=True)])

    def numbers(self) -> list[float]:
        """All counters, in the order of the fields."""
        return [getattr(self, f.name) for f in fields(self) if f.name != "lock"]

    def to_json(self) -> dict[str, float]:
        names = [f.name for f in fields(self) if f.name != "lock"]
        return dict(zip(names, self.numbers(), strict=True))

    @property
    def hit_rate(self) -> float:
        """The share of requests that were hits; 1 if there were none."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0


def _from_numbers(numbers: list[float]) -> IOStats:
    made = IOStats()
    for name, number in zip(made.to_json(), numbers, strict=True):
        setattr(made, name, number)
    return made
