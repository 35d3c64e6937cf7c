"""Which transport carries what: torch.distributed, sockets, or each what it is faster at."""

from __future__ import annotations

from collections.abc import Mapping

from outsize.errors import OptionError
from outsize.parallel.gloo import Gloo
from outsize.parallel.meeting import Mesh
from outsize.parallel.sockets import Sockets
from outsize.parallel.transport import Buffer, Sending, Transport, Wire

TRANSPORTS = ("auto", "torch", "sockets")
LARGE = 64 << 10  # bytes from which a message goes over torch.distributed, in `auto`


class Both:
    """Messages by their size over one of two transports; both ends know it, so they choose alike."""

    def __init__(self, small: Transport, large: Transport, least: int = LARGE) -> None:
        self.rank, self.world = small.rank, small.world
        self._small, self._large, self._least = small, large, least

    @property
    def wire(self) -> Wire:
        return self._small.wire.with_more(self._large.wire)

    def exchange(self, out: Buffer, into: Mapping[int, Buffer]) -> None:
        self.scatter(dict.fromkeys(into, out), into)

    def scatter(self, out: Mapping[int, Buffer], into: Mapping[int, Buffer]) -> None:
        for large in (False, True):
            some = {r: b for r, b in out.items() if (len(b) >= self._least) is large}
            come = {r: b for r, b in into.items() if (len(b) >= self._least) is large}
            if some or come:
                self._of(large).scatter(some, come)

    def send(self, to: int, out: Buffer) -> Sending:
        return self._of(len(out) >= self._least).send(to, out)

    def receive(self, of: int, into: Buffer) -> None:
        self._of(len(into) >= self._least).receive(of, into)

    def _of(self, large: bool) -> Transport:
        return self._large if large else self._small

    def close(self) -> None:
        self._small.close()
        self._large.close()


def transport(mesh: Mesh, name: str = "auto") -> Transport:
    """One of TRANSPORTS over a mesh; all ranks must ask for the same. Raises OptionError, PeerError."""
    if name not in TRANSPORTS:
        raise OptionError(f"there is no transport {name!r}; there are {', '.join(TRANSPORTS)}")
    if mesh.world == 1 or name == "sockets":
        return Sockets(mesh)
    large = Gloo(mesh)  # before the sockets stop blocking: its addresses go over them
    return large if name == "torch" else Both(Sockets(mesh), large)
