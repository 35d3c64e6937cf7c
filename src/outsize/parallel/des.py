"""A simulator of ranks: what they compute and send, in virtual time, over links as slow.py models them.

Each rank has a program: computing for so long, sending so many bytes, receiving what another sent. Its times
are measured on one machine; what the simulator adds are the links and the waiting. `play` runs the same
program for real, so that the two can be compared where there are as many cores as ranks. Everything else that
comes out of here is a simulation, and is to be called one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from outsize.parallel.slow import Link
from outsize.parallel.transport import Transport


@dataclass(frozen=True)
class Compute:
    seconds: float
    what: str = ""


@dataclass(frozen=True)
class Send:
    """The rank goes on at once; its link is busy for as long as the bytes take."""

    to: int
    size: int


@dataclass(frozen=True)
class Receive:
    of: int
    size: int


Op = Compute | Send | Receive
Program = Sequence[Op]


@dataclass(frozen=True)
class Stops:
    """Of a rank that goes and stands in turn, as a process that another stops again and again: seconds."""

    going_s: float
    standing_s: float

    def after(self, now: float, seconds: float) -> float:
        """When what begins at `now` has had so many seconds of the rank's own; if the rank stands then, when
        it goes again."""
        period = self.going_s + self.standing_s
        rounds, within = divmod(now, period)
        done = rounds * self.going_s + min(within, self.going_s) + seconds
        rounds, within = divmod(done, self.going_s)
        return max(now, rounds * period + within)


NO_STOPS: Mapping[int, Stops] = MappingProxyType({})


@dataclass
class Outcome:
    """Of one rank, in seconds."""

    end: float = 0.0
    computed: float = 0.0
    waited: float = 0.0
    sent: int = 0
    messages: int = 0


@dataclass
class _Rank:
    ops: deque[Op]
    outcome: Outcome = field(default_factory=Outcome)
    now: float = 0.0
    out_free: float = 0.0
    in_free: float = 0.0
    stops: Stops | None = None

    def work(self, seconds: float) -> None:
        self.now = self.now + seconds if self.stops is None else self.stops.after(self.now, seconds)


def simulate(
    programs: Sequence[Program],
    link: Link,
    call_s: float = 0.0,
    stops: Mapping[int, Stops] = NO_STOPS,
) -> list[Outcome]:
    """Run the ranks' programs together. `call_s`: what sending or receiving one message costs a rank's own
    time; `stops`: of ranks that stand again and again. Raises ValueError if they wait for each other for
    ever."""
    ranks = [_Rank(deque(program), stops=stops.get(r)) for r, program in enumerate(programs)]
    sent: dict[tuple[int, int], deque[float]] = {}
    while any(rank.ops for rank in ranks):
        if not any(_advance(number, rank, sent, link, call_s) for number, rank in enumerate(ranks)):
            raise ValueError(
                f"the ranks wait for each other: {[r.ops[0] if r.ops else None for r in ranks]}"
            )
    return [rank.outcome for rank in ranks]


def _advance(
    number: int, rank: _Rank, sent: dict[tuple[int, int], deque[float]], link: Link, call_s: float
) -> bool:
    """Run a rank until it waits for what is not sent yet. Did it move?"""
    moved = False
    while rank.ops:
        op = rank.ops[0]
        if isinstance(op, Compute):
            rank.work(op.seconds)
            rank.outcome.computed += op.seconds
        elif isinstance(op, Send):
            rank.work(call_s)
            rank.out_free = max(rank.now, rank.out_free) + link.duration(op.size)
            sent.setdefault((number, op.to), deque()).append(rank.out_free + link.delay_s)
            rank.outcome.sent += op.size
            rank.outcome.messages += 1
        else:
            arriving = sent.get((op.of, number))
            if not arriving:
                break
            rank.in_free = max(arriving.popleft(), rank.in_free + link.duration(op.size))
            rank.outcome.waited += max(0.0, rank.in_free - rank.now)
            rank.now = max(rank.now, rank.in_free)
            rank.work(call_s)
        rank.ops.popleft()
        rank.outcome.end, moved = rank.now, True
    return moved


def play(program: Program, transport: Transport, spin: bool = True) -> float:
    """Run one rank's program for real: seconds that it took. Computing is spun (or slept, where ranks have no
    core each)."""
    start, going = time.monotonic(), []
    for op in program:
        if isinstance(op, Compute):
            _pass(op.seconds, spin)
        elif isinstance(op, Send):
            going.append(transport.send(op.to, bytes(op.size)))
        else:
            transport.receive(op.of, bytearray(op.size))
    for sending in going:
        sending.wait()
    return time.monotonic() - start


def _pass(seconds: float, spin: bool) -> None:
    if not spin:
        time.sleep(seconds)
        return
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
