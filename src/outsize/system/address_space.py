"""Limits on the addresses that a process may map (`ulimit -v`, `ulimit -d`), used or not. Imports nothing
heavy: libraries that meet such a limit while they are loaded end the process, so it is looked at before."""

from __future__ import annotations

import sys
from collections.abc import Sequence

MB = 1_000_000
# What a process maps beyond what it ever touches: stacks and heaps of threads, buffers of libraries.
BEYOND = 200 * MB
LIBRARIES = 650 * MB  # what Python and torch map; below this, torch's loading may abort
LIGHT = ("version", "list", "rm", "--help", "-h")  # commands that load no libraries


def limits() -> list[tuple[str, int, int]]:
    """(the shell's name, limit, bytes taken) of each that is set."""
    if sys.platform == "win32":
        return []
    import resource

    kinds = {"ulimit -v": resource.RLIMIT_AS, "ulimit -d": resource.RLIMIT_DATA}
    set_to = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    found = {name: limit for name, limit in set_to.items() if limit != resource.RLIM_INFINITY}
    if not found:
        return []
    import psutil

    now = psutil.Process().memory_info()
    taken = {"ulimit -v": now.vms, "ulimit -d": getattr(now, "data", 0)}
    return [(name, limit, taken[name]) for name, limit in found.items()]


def mappable(resident: int) -> int:
    """What a process that has `resident` bytes in memory could have by these limits."""
    left = (limit - size - BEYOND + resident for _, limit, size in limits())
    return min(left, default=1 << 62)


def bounds() -> str:
    """The limits in words, for errors where memory is short; "" where none is set."""
    return "".join(
        f"; {name} lets this process map {limit / MB:,.0f} MB, of which {size / MB:,.0f} MB are taken"
        for name, limit, size in limits()
    )


def refusal(arguments: Sequence[str], error: BaseException | None = None) -> str:
    """Why a command cannot run under these limits, or, after an error, has failed; "" if they are not to
    blame."""
    if not limits() or (error is None and set(LIGHT) & set(arguments)):
        return ""
    name, limit, _ = min(limits(), key=lambda found: found[1])
    least = LIBRARIES if name == "ulimit -v" else BEYOND
    if error is None and limit >= least:
        return ""
    why = "" if error is None else f" ({type(error).__name__})"
    return (
        f"{name} lets this process map {limit / MB:,.0f} MB, which is too little{why}: libraries map "
        f"{LIBRARIES / MB:,.0f} MB, and the model comes on top; raise it"
    )
