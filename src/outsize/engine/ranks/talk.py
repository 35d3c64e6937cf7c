"""What ranks tell each other before their weights are read: JSON objects over the connections of their mesh,
and what must be alike on all of them.

The leader: which pack, and how. Each rank: what it has (memory, speed), or why it cannot. The leader: who
holds what. Each: that its plan fits, then that its weights are there.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from outsize.errors import OutsizeError, PeerError
from outsize.kernels.attention import CHUNK
from outsize.kernels.backend import Backend
from outsize.parallel.connect import Both
from outsize.parallel.gloo import Gloo
from outsize.parallel.meeting import Mesh
from outsize.parallel.sockets import Sockets
from outsize.parallel.transport import Transport

MOST = 1 << 20  # bytes of a message
WAIT_S = 60.0  # for gloo's addresses


def digest(backend: Backend) -> str:
    """Of ranks that differ in this, none has the others' bits: instructions, kernels, torch."""
    library = backend.library
    bf16 = None if library is None else bool(library.bf16_products())
    told = (
        platform.machine(), torch.backends.cpu.get_cpu_capability(), f"bf16={bf16}", backend.name,
        f"torch {torch.__version__}", f"chunks of {CHUNK}",
    )  # fmt: skip
    return ", ".join(told)


def short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Talk:
    """One rank's words with the others. All calls raise PeerError."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.rank, self.world = mesh, mesh.rank, mesh.world
        self._sockets = Sockets(mesh)

    def say(self, to: int, told: Mapping[str, object]) -> None:
        body = json.dumps(told).encode()
        for message in (len(body).to_bytes(8, "little"), body):
            self._sockets.send(to, message).wait()

    def give(self, to: int, data: bytes) -> None:
        """Bytes of which the other knows how many come."""
        self._sockets.send(to, data).wait()

    def take(self, of: int, size: int) -> bytes:
        data = bytearray(size)
        self._sockets.receive(of, data)
        return bytes(data)

    def say_all(self, told: Mapping[str, object]) -> None:
        for rank in self.mesh.data:
            self.say(rank, told)

    def hear(self, of: int) -> dict[str, Any]:
        """Raises PeerError also where that rank says that it cannot."""
        size = bytearray(8)
        self._sockets.receive(of, size)
        count = int.from_bytes(size, "little")
        if count > MOST:
            raise PeerError(f"rank {of} sent {count:,} bytes where at most {MOST:,} are read", of)
        body = bytearray(count)
        self._sockets.receive(of, body)
        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise PeerError(f"rank {of} sent what is no JSON object", of)
        if "error" in told:
            raise PeerError(f"{self.mesh.data[of].who} cannot: {str(told['error'])[:500]}", of)
        return told

    def hear_all(self) -> dict[int, dict[str, Any]]:
        return {rank: self.hear(rank) for rank in self.mesh.data}

    def transport(self, over: str) -> Transport:
        """What steps are run over, from now on."""
        if over == "sockets":
            return self._sockets
        for channel in self.mesh.data.values():  # gloo's addresses go over them, one after another
            channel.sock.settimeout(WAIT_S)
        group = Gloo(self.mesh)
        for channel in self.mesh.data.values():
            channel.sock.setblocking(False)
        return group if over == "torch" else Both(self._sockets, group)


@contextmanager
def telling(talk: Talk, to: int = 0) -> Iterator[None]:
    """What this rank cannot, that one is told."""
    try:
        yield
    except PeerError:
        raise
    except OutsizeError as e:
        talk.say(to, {"error": str(e)})
        raise


def field(told: Mapping[str, Any], name: str, kind: type, of: int) -> Any:
    """Raises PeerError where a rank's message has no such value."""
    value = told.get(name)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise PeerError(f"rank {of} sent {name} {value!r}, which is no {kind.__name__}", of)
    return value
