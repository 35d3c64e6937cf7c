"""How much memory there is for this process, and how much it has: the control group counts, where there
is one."""

from __future__ import annotations

import contextlib
import ctypes
import numbers
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from outsize.errors import OptionError
from outsize.options import parse_size

AUTO_SHARE, AUTO_MOST = 0.1, 1 << 30  # what `auto` leaves free: a tenth, at most 1 GiB
PRESSURE_SHARE = 0.01  # less than this of the machine free: the cache shrinks
WATCH_S = 0.25
_GROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
_V2 = "memory.max", "memory.current", ("inactive_file", "active_file")


def resident() -> int:
    """Bytes of memory this process has now, mapped files included."""
    return int(psutil.Process().memory_info().rss)


def trim() -> None:
    """Ask the allocator to return what it keeps for later."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def peak() -> int:
    """The most it has had so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _groups() -> Iterator[tuple[Path, tuple[str, str, tuple[str, str]]]]:
    """This process's memory control groups, innermost first."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root, names = (_GROUPS / "memory", _V1) if kinds else (_GROUPS, _V2)
        here = root / path.lstrip("/")
        while here != root.parent:
            yield here, names
            here = here.parent


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return _UNLIMITED if text == "max" else int(text)


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
    for group, (limit_name, usage_name, cache_keys) in _groups():
        limit, usage = _number(group / limit_name), _number(group / usage_name)
        if limit is not None and usage is not None and limit < memory.total:
            yield limit, limit - usage + _cached(group, cache_keys)


def total() -> int:
    """The most that this process could ever have."""
    return min(limit for limit, _ in limits())


def free() -> int:
    """What this process could have now, with what it already has."""
    return min(left for _, left in limits()) + resident()


def shortage() -> int:
    """Bytes that are missing for comfort now, because of others; 0 if none."""
    return max(int(limit * PRESSURE_SHARE) - left for limit, left in limits())


def parse(text: str | int) -> int:
    """Bytes from '4GB', '900MB', '75%' (of the machine or the control group) or 'auto' (what is free,
    less a tenth, at most 1 GiB). Raises OptionError."""
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
    """Tells, now and then, how many bytes must be given up: for others, or to keep the promise."""

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
