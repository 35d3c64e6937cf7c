"""What ranks tell each other when they meet, the first time or again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from outsize.engine.ranks.how import address
from outsize.engine.ranks.sync import Sync
from outsize.engine.ranks.talk import Talk, digest
from outsize.kernels.backend import Backend
from outsize.log import say, silent
from outsize.options import LoadOptions
from outsize.pack.format import Pack
from outsize.parallel.meeting import Hello, Meeting
from outsize.parallel.spec import ParallelSpec


class How(NamedTuple):
    """How a model is run by several ranks."""

    spec: ParallelSpec
    backend: Backend
    sync: Sync
    options: LoadOptions


def introduced(talk: Talk, pack: Pack, measured: bool) -> Mapping[int, Mapping[str, Any]]:
    """What each of the others has, once it is told which model; `measured`: how fast it is, too. Raises
    PeerError."""
    source = pack.source
    told = {"identity": source.identity, "layout": source.layout, "name": source.spec}
    talk.say_all({**told, "measured": measured})
    return talk.hear_all()


def met_again(how: How, pack: Pack, why: str) -> Talk:
    """Wait for all other ranks where the first ones came. Raises PeerError."""
    host, port = address(how.options.listen or "")
    tell = silent if how.options.quiet else say
    tell(f"{why}; waiting for `outsize join {host}:{port}` of all others, to go on")
    mesh = Meeting(host, port).gather(Hello(digest(how.backend), how.options.ranks), say=tell)
    talk = Talk(mesh)
    introduced(talk, pack, False)
    return talk
