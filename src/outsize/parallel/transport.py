"""Bytes between ranks: the protocol that every transport has, and one within a process.

A rank is one of `world` processes (or threads, or machines) that run a model together, numbered from 0. A
transport knows bytes alone: whoever calls it knows beforehand how many bytes come from whom, and anything
else is an error. Ranks must make the same calls in the same order; one call at a time is under way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from outsize.errors import PeerError

Buffer = bytes | bytearray | memoryview
SILENCE_S = 10.0  # after so long without a sign of life a peer is lost
LOOK_S = 0.25  # between two looks at whether a peer still lives, while waiting


@dataclass(slots=True)
class Wire:
    """What a rank has sent and received. Payload only: what a transport adds of its own is `overhead`."""

    messages: int = 0  # sent, one a peer
    sent: int = 0  # bytes of payload
    received: int = 0
    overhead: int = 0  # bytes sent around the payload, as far as this transport knows them
    waited_s: float = 0.0  # within the transport's calls: sending, and waiting for what others send

    def with_more(self, other: Wire) -> Wire:
        return Wire(
            self.messages + other.messages, self.sent + other.sent, self.received + other.received,
            self.overhead + other.overhead, self.waited_s + other.waited_s,
        )  # fmt: skip


class Sending(Protocol):
    def wait(self) -> None:
        """Return once the buffer may be changed. Raises PeerError."""


class Transport(Protocol):
    """What a collective needs of the ranks' connections. All calls raise PeerError if a peer is lost."""

    rank: int
    world: int

    @property
    def wire(self) -> Wire:
        """What has been counted so far."""

    def exchange(self, out: Buffer, into: Mapping[int, Buffer]) -> None:
        """Send `out` to every rank that `into` names while its message comes into the buffer there, of
        exactly that length. The ranks named must name this one."""

    def scatter(self, out: Mapping[int, Buffer], into: Mapping[int, Buffer]) -> None:
        """The same with a buffer of its own for each rank; both name the same ranks."""

    def send(self, to: int, out: Buffer) -> Sending:
        """Start sending to one rank; `out` stays as it is until `wait` returns."""

    def receive(self, of: int, into: Buffer) -> None:
        """Fill the buffer with the next message of one rank."""

    def close(self) -> None:
        """End all connections; the others' next call that needs this rank raises PeerError."""


class Switch:
    """A Transport in whose place another may come: when ranks were lost, and came again."""

    def __init__(self, inner: Transport) -> None:
        self.rank, self.world, self._inner, self._before = inner.rank, inner.world, inner, Wire()

    def replace(self, inner: Transport) -> None:
        """By another of as many ranks."""
        self._before, self._inner = self.wire, inner

    @property
    def wire(self) -> Wire:
        """All that was sent and received, through this one and those before."""
        return self._before.with_more(self._inner.wire)

    def exchange(self, out: Buffer, into: Mapping[int, Buffer]) -> None:
        self._inner.exchange(out, into)

    def scatter(self, out: Mapping[int, Buffer], into: Mapping[int, Buffer]) -> None:
        self._inner.scatter(out, into)

    def send(self, to: int, out: Buffer) -> Sending:
        return self._inner.send(to, out)

    def receive(self, of: int, into: Buffer) -> None:
        self._inner.receive(of, into)

    def close(self) -> None:
        self._inner.close()


class Sent:
    """Of a message that has gone already."""

    def wait(self) -> None:
        return None


def others(rank: int, world: int) -> list[int]:
    return [r for r in range(world) if r != rank]


class _Room:
    """What the ranks of a process share: a queue for each pair, and who has left."""

    def __init__(self, world: int) -> None:
        pairs = [(a, b) for a in range(world) for b in range(world) if a != b]
        self.queues: dict[tuple[int, int], SimpleQueue[bytes]] = {p: SimpleQueue() for p in pairs}
        self.left: set[int] = set()


class Threads:
    """One of several ranks in one process, a thread each: the reference of every law. A message is copied
    once, into the queue."""

    def __init__(self, rank: int, world: int, room: _Room) -> None:
        self.rank, self.world, self.wire, self._room = rank, world, Wire(), room

    def exchange(self, out: Buffer, into: Mapping[int, Buffer]) -> None:
        self.scatter(dict.fromkeys(into, out), into)

    def scatter(self, out: Mapping[int, Buffer], into: Mapping[int, Buffer]) -> None:
        for rank, buffer in out.items():
            self.send(rank, buffer)
        for rank, buffer in into.items():
            self.receive(rank, buffer)

    def send(self, to: int, out: Buffer) -> Sending:
        self.wire.messages += 1
        self.wire.sent += len(out)
        self._room.queues[self.rank, to].put(bytes(out))
        return Sent()

    def receive(self, of: int, into: Buffer) -> None:
        start = time.monotonic()
        message = self._next(of)
        if len(message) != len(into):
            raise PeerError(
                f"rank {of} sent {len(message)} bytes where {len(into)} were to come: the ranks are not "
                "at the same step",
                of,
            )
        memoryview(into)[:] = message
        self.wire.received += len(message)
        self.wire.waited_s += time.monotonic() - start

    def _next(self, of: int) -> bytes:
        queue = self._room.queues[of, self.rank]
        while True:
            gone = (
                of in self._room.left
            )  # looked at first: what it sent before it left is still there
            try:
                return queue.get_nowait() if gone else queue.get(timeout=LOOK_S)
            except Empty:
                if gone:
                    raise PeerError(f"rank {of} has left", of) from None

    def close(self) -> None:
        self._room.left.add(self.rank)


def threads(world: int) -> list[Threads]:
    """The transports of `world` ranks of this process."""
    room = _Room(world)
    return [Threads(rank, world, room) for rank in range(world)]
