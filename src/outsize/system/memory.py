"""Memory of this process: how much it has, and how much it may have by the machine, its control groups and
`ulimit`. All in bytes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import numbers
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakKeyDictionary

import psutil

from outsize.errors import OptionError
from outsize.options import parse_size
from outsize.system import address_space, cgroups

AUTO_SHARE, AUTO_MOST = 0.1, 1 << 30  # what `auto` leaves free: a tenth, at most 1 GiB
PRESSURE_SHARE = 0.01  # less than this of the machine free: the cache shrinks
WATCH_S = 0.25
# By version: the limits (past "high" a group is slowed down until it stands), the use, its page cache.
_NAMES = {
    1: (
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
    2: (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
}


def resident() -> int:
    """Bytes of memory this process has now, mapped files included."""
    return int(psutil.Process().memory_info().rss)


def trim() -> None:
    """Ask the allocator to return what it keeps for later."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def peak() -> int:
    """The most it has had so far. Linux's `ru_maxrss` also counts what the process had that started this one,
    as a notebook's or a test's, so there its own high-water mark is read."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if (own := _high_water()) is not None:
        return own
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _high_water() -> int | None:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(text.partition("VmHWM:")[2].split(maxsplit=1)[0]) << 10
    except (OSError, ValueError, IndexError):
        return None


_later: WeakKeyDictionary[object, int] = WeakKeyDictionary()


def promise(owner: object, size: int) -> None:
    """An open model will take `size` bytes more while it answers: others leave them to it. 0 ends that."""
    _later[owner] = size


def collect() -> None:
    """Return what models that were closed have left: objects that only a collection finds, and holes."""
    if _later:
        gc.collect()
    trim()


def promised() -> int:
    """Bytes that open models have not taken yet."""
    return sum(_later.values())


def _cached(group: Path, keys: tuple[str, str]) -> int:
    """Bytes of page cache charged to a group, which it gives up when it must."""
    try:
        pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        return sum(int(value) for key, value in pairs if key in keys)
    except (OSError, ValueError):
        return 0


def limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes free) of the machine and of each control group that has a limit."""
    memory = psutil.virtual_memory()
    yield memory.total, memory.available
    for group, version in cgroups.groups("memory"):
        names, usage_name, cache_keys = _NAMES[version]
        found = [n for name in names if (n := cgroups.number(group / name)) is not None]
        limit, usage = min(found, default=cgroups.UNLIMITED), cgroups.number(group / usage_name)
        if usage is not None and limit < memory.total:
            yield limit, limit - usage + _cached(group, cache_keys)


def total() -> int:
    """The most that this process could ever have."""
    return min(limit for limit, _ in limits())


def free() -> int:
    """What this process could have now, with what it already has."""
    return min(min(left for _, left in limits()) + resident(), address_space.mappable(resident()))


def shortage() -> int:
    """Bytes that are missing for comfort now, because of others; 0 if none."""
    return max(int(limit * PRESSURE_SHARE) - left for limit, left in limits())


def parse(text: str | int) -> int:
    """Bytes from '4GB', '900MB', '75%' (of the machine or the control group) or 'auto' (what is free,
    less a tenth, at most 1 GiB); no more than this process may map. Raises OptionError."""
    return max(1, min(_parse(text), address_space.mappable(resident())))


def _parse(text: str | int) -> int:
    if isinstance(text, numbers.Integral) and not isinstance(text, bool):
        return _positive(int(text), text)
    text = str(text).strip().lower()
    if text == "auto":
        now = free()
        return now - min(int(now * AUTO_SHARE), AUTO_MOST)
    if text.endswith("%"):
        try:
            share = float(text[:-1])
        except ValueError:
            share = 0.0
        if not 0 < share <= 100:
            raise OptionError(f"memory is {text!r}; a percentage from 1% to 100% is expected")
        return int(total() * share / 100)
    return _positive(parse_size(text, "memory"), text)


def _positive(size: int, text: object) -> int:
    if size <= 0:
        raise OptionError(f"memory is {text!r}; more than nothing is expected, like 900MB or 4GB")
    return size


class Watch:
    """Watches memory while a model runs: how many bytes must be freed, for others or to keep the budget."""

    def __init__(self, budget: int) -> None:
        self._budget, self._next = budget, 0.0

    def excess(self) -> int:
        """Bytes to free now. Looks at most four times a second."""
        now = time.monotonic()
        if now < self._next:
            return 0
        self._next = now + WATCH_S
        if resident() > self._budget:
            trim()  # holes in the heap are not worth weights
        return max(0, shortage(), resident() - self._budget)
