"""Ranks of this machine on a core each, while they are measured: what shares a core with another is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def pinned(world: int) -> Iterator[bool]:
    """This process and those of `outsize join` that it started, all their threads, on a core each; where
    there are fewer cores than ranks, or cores cannot be chosen, nothing changes. Gives whether they are."""
    allowed = sorted(getattr(os, "sched_getaffinity", lambda _: ())(0))
    own, joined = psutil.Process(), list[psutil.Process]()
    for child in own.children():
        with suppress(psutil.Error):
            joined += [child] if "join" in child.cmdline() else []
    if len(allowed) < world or len(joined) != world - 1:
        yield False
        return
    for core, process in zip(allowed, [own, *joined], strict=False):
        _move(process, {core})
    try:
        yield True
    finally:
        _move(own, set(allowed))


def _move(process: psutil.Process, cores: set[int]) -> None:
    """All threads."""
    for thread in process.threads():
        with suppress(OSError):  # one that has ended
            os.sched_setaffinity(thread.id, cores)
