"""A slower link than there is, for measurements: a model of one, over any transport on one machine.

Each message carries the time at which it would have arrived, on the machine's monotonic clock; who receives
it waits until then. Shapers of the kernel let short messages through at full speed while their bucket is not
empty, and this kernel has none that delays; long spans may be measured with those, too.

    leaves = max(now, sender's link free) + bytes / rate        arrives = leaves + delay
    at the receiver: not before its own link has taken what came before, at the same rate
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from outsize.errors import OptionError, PeerError
from outsize.parallel.transport import Buffer, Sending, Transport, Wire

STAMP = struct.Struct("<d")
PACKET, HEADERS = 1448, 66  # bytes of payload in an Ethernet frame of TCP, and around them
SPUN_S = 2e-4  # a sleep is late by some 60 us: the rest of short waits is spun


@dataclass(frozen=True)
class Link:
    """One-way delay in seconds, and bytes a second of each rank's connection, each way."""

    delay_s: float
    bytes_per_s: float

    def duration(self, size: int) -> float:
        """Seconds for which a message of so many bytes occupies the link."""
        return (size + HEADERS * max(1, -(-size // PACKET))) / self.bytes_per_s


LATENCY_S = 1e-4  # of a link that nothing is said of: a switch
UNITS = {"kbit/s": 125.0, "mbit/s": 125e3, "gbit/s": 125e6}


def parse_link(text: str) -> Link:
    """`100Mbit/s` or `1Gbit/s,0.2ms`. Raises OptionError."""
    rate, _, latency = text.lower().replace(" ", "").partition(",")
    for unit, size in UNITS.items():
        if rate.endswith(unit):
            number = _number(rate.removesuffix(unit))
            wait = LATENCY_S if not latency else _number(latency.removesuffix("ms")) / 1e3
            if (
                0 < number < float("inf")
                and 0 <= wait < 3600
                and (not latency or latency.endswith("ms"))
            ):
                return Link(wait, number * size)
    raise OptionError(
        f"link is {text!r}; RATE[,LATENCY] is expected, as in 100Mbit/s or 1Gbit/s,0.2ms"
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0


class Slow:
    """A Transport as slow as `link`. `wire` counts the payload without the time stamps."""

    def __init__(
        self, transport: Transport, link: Link, noise: Callable[[], float] = lambda: 1.0
    ) -> None:
        """`noise`: how many times as long the next message takes to leave, of a link that others use, too."""
        self.rank, self.world, self.wire = transport.rank, transport.world, Wire()
        self._inner, self._link, self._noise = transport, link, noise
        self._out_free = self._in_free = 0.0

    def exchange(self, out: Buffer, into: Mapping[int, Buffer]) -> None:
        self.scatter(dict.fromkeys(into, out), into)

    def scatter(self, out: Mapping[int, Buffer], into: Mapping[int, Buffer]) -> None:
        start = time.perf_counter()
        stamped = {r: self._stamped(b) for r, b in out.items()}
        came = {r: bytearray(STAMP.size + len(b)) for r, b in into.items()}
        self._inner.scatter(stamped, came)
        self._take(came, into)
        self.wire.waited_s += time.perf_counter() - start

    def send(self, to: int, out: Buffer) -> Sending:
        return self._inner.send(to, self._stamped(out))

    def receive(self, of: int, into: Buffer) -> None:
        start = time.perf_counter()
        came = bytearray(STAMP.size + len(into))
        self._inner.receive(of, came)
        self._take({of: came}, {of: into})
        self.wire.waited_s += time.perf_counter() - start

    def _stamped(self, out: Buffer) -> bytes:
        takes_s = self._link.duration(len(out)) * self._noise()
        self._out_free = max(time.monotonic(), self._out_free) + takes_s
        self.wire.messages += 1
        self.wire.sent += len(out)
        return STAMP.pack(self._out_free + self._link.delay_s) + bytes(out)

    def _take(self, came: Mapping[int, bytearray], into: Mapping[int, Buffer]) -> None:
        """Hand over what came, in order of arrival, once it would have."""
        due = sorted((STAMP.unpack_from(message)[0], rank) for rank, message in came.items())
        for at, rank in due:
            if not at < time.monotonic() + 3600:
                raise PeerError(f"rank {rank} sent what a slow link did not stamp", rank)
            size = len(into[rank])
            self._in_free = max(at, self._in_free + self._link.duration(size))
            _until(self._in_free)
            memoryview(into[rank])[:] = memoryview(came[rank])[STAMP.size :]
            self.wire.received += size

    def close(self) -> None:
        self._inner.close()


def _until(at: float) -> None:
    left = at - time.monotonic()
    if left > SPUN_S:
        time.sleep(left - SPUN_S)
    while time.monotonic() < at:
        pass
