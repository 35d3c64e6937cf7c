"""Meshes of ranks in one process over the loopback, and as processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from outsize.parallel.meeting import Hello, Meeting, Mesh, join

HERE = "127.0.0.1"


def meshes(world: int, hello: Hello = Hello()) -> list[Mesh]:  # noqa: B008
    """By rank."""
    meeting = Meeting(HERE, 0)
    with ThreadPoolExecutor(world) as pool:
        first = pool.submit(meeting.gather, replace(hello, world=world), 20)
        rest = [
            pool.submit(join, HERE, meeting.port, replace(hello, rank=r), 20)
            for r in range(1, world)
        ]
        return [f.result() for f in (first, *rest)]
