"""Every transport is like threads in one process: the same bits, counts, and a sentence for a lost rank."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from outsize.errors import OptionError, PeerError
from outsize.parallel.collective import Point
from outsize.parallel.connect import LARGE, TRANSPORTS, transport
from outsize.parallel.exact import Exact
from outsize.parallel.frames import HEAD, Kind
from outsize.parallel.gloo import Gloo
from outsize.parallel.meeting import Mesh
from outsize.parallel.secret import NAME
from outsize.parallel.sockets import Sockets
from outsize.parallel.transport import Switch, Transport, threads
from tests.parallel.meet import meshes
from tests.parallel.ranks import on_all

AT = Point(1, "attention")
KINDS: dict[str, Callable[[Mesh], Transport]] = {
    "sockets": Sockets,
    "gloo": Gloo,
    "auto": transport,
}
each = pytest.mark.parametrize("kind", KINDS)


def over(kind: str, world: int) -> list[Transport]:
    made = meshes(world)
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(KINDS[kind], made))


def some_calls(t: Transport, seed: int) -> list[Tensor]:
    """Sums and gathers of many sizes, with pauses of each rank's own."""
    of_all, own = random.Random(seed), random.Random(seed * 10 + t.rank)
    exact, pending = Exact(t), []
    for call in range(30):
        rows, width = of_all.choice([0, 1, 2, 5, 16, 80, 700]), 32 * of_all.randint(1, 8)
        made = torch.Generator().manual_seed(call * 10 + t.rank)
        part = torch.randn(rows, width, generator=made).to(
            of_all.choice([torch.bfloat16, torch.float])
        )
        if own.random() < 0.2:
            time.sleep(own.random() / 100)
        if of_all.random() < 0.5:
            pending.append(exact.sum(part, AT))
        else:
            pending.append(exact.gather(part[:, t.rank :], AT, [width - r for r in range(t.world)]))
    return [p.wait() for p in pending]


@each
@pytest.mark.parametrize("world", [2, 3])
def test_the_bits_and_counts_of_threads(kind: str, world: int) -> None:
    reference = threads(world)
    wanted = on_all(reference, lambda t: some_calls(t, world))
    ranks = over(kind, world)
    for got in on_all(ranks, lambda t: some_calls(t, world)):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted[0], strict=True))
    for a, b in zip(ranks, reference, strict=True):
        assert (a.wire.messages, a.wire.sent, a.wire.received) == (
            b.wire.messages,
            b.wire.sent,
            b.wire.received,
        )
        a.close()


@each
def test_ten_megabytes_both_ways_and_one_way(kind: str) -> None:
    def run(t: Transport) -> bytes:
        other, into = 1 - t.rank, bytearray(10 << 20)
        t.exchange(bytes([t.rank]) * len(into), {other: into})
        assert into == bytes([other]) * len(into)
        sending = t.send(other, bytes([2 + t.rank]) * len(into))
        t.receive(other, into)
        sending.wait()
        return bytes(into[-5:])

    ranks = over(kind, 2)
    assert on_all(ranks, run) == [b"\3" * 5, b"\2" * 5]
    for t in ranks:
        t.close()


def test_bytes_at_the_socket() -> None:
    """What the transport says it sends is what the kernel takes: 16 bytes a message besides the payload."""
    ranks = over("sockets", 2)
    on_all(ranks, lambda t: Exact(t).sum(torch.zeros(3, 96).bfloat16(), AT).wait())
    for t in ranks:
        assert (t.wire.messages, t.wire.sent, t.wire.overhead) == (1, 3 * 96 * 2, 16)
        t.close()


def test_with_a_secret_frames_are_tagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "0123456789abcdef")
    made = meshes(2)
    ranks = [Sockets(m) for m in made]
    on_all(ranks, lambda t: Exact(t).sum(torch.zeros(3, 96).bfloat16(), AT).wait())
    assert [t.wire.overhead for t in ranks] == [32, 32]
    frame = b"".join(made[1].data[0].frame(Kind.DATA, b"12345678"))
    made[1].data[0].sock.sendall(frame[:20] + b"x" + frame[21:])
    with pytest.raises(
        PeerError, match=r"rank 1 \(127.0.0.1\) sent a message that was changed"
    ) as told:
        ranks[0].receive(1, bytearray(8))
    assert told.value.rank == 1
    for t in ranks:
        t.close()


@pytest.mark.parametrize(
    "head",
    [
        HEAD.pack(Kind.DATA, 9, 0),
        HEAD.pack(Kind.DATA, 1 << 31, 0),
        HEAD.pack(Kind.DATA, 8, 3),
        HEAD.pack(Kind.BYE, 8, 0),
    ],
)
def test_a_frame_that_was_not_to_come(head: bytes) -> None:
    made = meshes(2)
    ranks = [Sockets(m) for m in made]
    made[1].data[0].sock.sendall(head)
    with pytest.raises(
        PeerError, match=r"rank 1 .* sent a message .* where another .* was to come"
    ):
        ranks[0].receive(1, bytearray(8))
    for t in ranks:
        t.close()


@each
def test_a_rank_that_ends_is_named_by_all_and_says_why(kind: str) -> None:
    """Also by those that wait for another."""
    made = meshes(3)
    with ThreadPoolExecutor(3) as pool:
        ranks = list(pool.map(KINDS[kind], made))
    start = time.monotonic()

    def run(t: Transport) -> str:
        if t.rank == 2:
            time.sleep(0.1)
            made[2].close(ValueError("no room on the disk"))
            return ""
        with pytest.raises(PeerError) as told:
            t.receive(1 - t.rank, bytearray(8))
        made[t.rank].close(told.value)
        assert told.value.rank == 2
        return str(told.value)

    said = on_all(ranks, run)
    assert said[0] == said[1] == "rank 2 (127.0.0.1) ended: no room on the disk"
    assert time.monotonic() - start < 8


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose watch stands still, as of a machine that was switched off."""
    monkeypatch.setattr("outsize.parallel.watch.BEAT_S", 0.1)
    monkeypatch.setattr("outsize.parallel.watch.SILENCE_S", 1.0)
    made = meshes(2)
    monkeypatch.setattr(made[1].watch, "_beat", lambda now: None)
    t = Sockets(made[0])
    with pytest.raises(
        PeerError, match=r"rank 1 \(127.0.0.1\) gave no sign of life for 1 s"
    ) as told:
        t.receive(1, bytearray(8))
    assert told.value.rank == 1
    for mesh in made:
        mesh.close()


def test_by_name() -> None:
    for name, kind in zip(TRANSPORTS, ("Both", "Gloo", "Sockets"), strict=True):
        made = meshes(2)
        with ThreadPoolExecutor(2) as pool:
            ranks = list(pool.map(lambda m: transport(m, name), made))  # noqa: B023
        assert {type(t).__name__ for t in ranks} == {kind}
        for t in ranks:
            t.close()
    (alone,) = meshes(1)
    assert transport(alone, "torch").world == 1
    with pytest.raises(OptionError, match="no transport 'mpi'; there are auto, torch, sockets"):
        transport(alone, "mpi")
    alone.close()


def test_small_and_large_go_their_ways() -> None:
    made = meshes(2)
    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(transport, made))
    for size in (LARGE - 1, LARGE):
        on_all(ranks, lambda t: t.exchange(bytes(size), {1 - t.rank: bytearray(size)}))  # noqa: B023
    assert [t.wire.overhead for t in ranks] == [16, 16]  # of the small one alone
    assert [t.wire.sent for t in ranks] == [2 * LARGE - 1] * 2
    for t in ranks:
        t.close()


def test_another_in_its_place() -> None:
    """What was sent before still counts."""
    (first, _), (second, other) = threads(2), threads(2)
    switch = Switch(first)
    switch.send(1, b"12345")
    switch.replace(second)
    switch.send(1, b"67")
    got = bytearray(2)
    other.receive(0, got)
    assert got == b"67"
    assert (switch.wire.messages, switch.wire.sent) == (2, 7)


@each
def test_one_thread_sends_while_another_receives(kind: str) -> None:
    """In a chain of three the middle rank does both at once, in order each way."""
    size, count = 200_000, 12

    def run(t: Transport) -> list[bytes]:
        came = list[bytes]()

        def send() -> None:
            for n in range(count):
                t.send(t.rank + 1, bytes([n + t.rank]) * size).wait()

        def receive() -> None:
            for _ in range(count):
                into = bytearray(size)
                t.receive(t.rank - 1, into)
                came.append(bytes(into[:1]))

        jobs = ([send] if t.rank < 2 else []) + ([receive] if t.rank else [])
        with ThreadPoolExecutor(2) as pool:
            for job in [pool.submit(job) for job in jobs]:
                job.result()
        return came

    ranks = over(kind, 3)
    _, second, third = on_all(ranks, run)
    assert second == [bytes([n]) for n in range(count)]
    assert third == [bytes([n + 1]) for n in range(count)]
    assert [t.wire.sent for t in ranks] == [size * count, size * count, 0]
    for t in ranks:
        t.close()
