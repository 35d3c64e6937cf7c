"""The model of a slow link: what is sent is what comes, no sooner than the formula says."""

from __future__ import annotations

import time

import pytest
import torch

from outsize.errors import PeerError
from outsize.parallel.slow import Link, Slow
from outsize.parallel.transport import Transport, threads
from tests.parallel.ranks import on_all
from tests.parallel.test_transports import some_calls


def test_the_bits_of_the_transport_below() -> None:
    wanted = on_all(threads(3), lambda t: some_calls(t, 1))
    ranks = threads(3)
    slow = on_all(ranks, lambda t: some_calls(Slow(t, Link(1e-5, 1e9)), 1))
    assert all(torch.equal(a, b) for a, b in zip(slow[0], wanted[0], strict=True))


def seconds(world: int, link: Link, size: int) -> list[float]:
    """From a common start until each rank has everything of one exchange."""

    def run(t: Transport) -> float:
        slow = Slow(t, link)
        slow.exchange(b"", {r: bytearray() for r in range(t.world) if r != t.rank})  # all are there
        start = time.monotonic()
        slow.exchange(bytes(size), {r: bytearray(size) for r in range(t.world) if r != t.rank})
        assert slow.wire.sent == slow.wire.received == size * (t.world - 1)
        return time.monotonic() - start

    return on_all(threads(world), run)


def test_delay_and_rate() -> None:
    assert Link(0.0, 1e6).duration(1448) == pytest.approx((1448 + 66) / 1e6)
    assert Link(0.0, 1e6).duration(1449) == pytest.approx((1449 + 132) / 1e6)
    assert min(seconds(2, Link(0.05, 1e9), 1000)) >= 0.04
    assert min(seconds(2, Link(0.0, 1e6), 50_000)) >= 0.05
    assert min(seconds(3, Link(0.0, 1e6), 50_000)) >= 0.1  # two messages over one link
    assert max(seconds(2, Link(0.0, 1e9), 1000)) < 0.5


def test_messages_queue_at_the_sender() -> None:
    a, b = threads(2)
    sender, receiver = Slow(a, Link(0.05, 1e6)), Slow(b, Link(0.05, 1e6))
    start = time.monotonic()
    for _ in range(3):
        sender.send(1, bytes(20_000))
    assert time.monotonic() - start < 0.05
    for _ in range(3):
        receiver.receive(0, bytearray(20_000))
    assert 0.11 <= time.monotonic() - start < 0.5


def test_what_has_no_stamp() -> None:
    a, b = threads(2)
    a.send(1, b"\xff" * 8 + b"x")
    with pytest.raises(PeerError, match="did not stamp"):
        Slow(b, Link(0, 1e6)).receive(0, bytearray(1))
