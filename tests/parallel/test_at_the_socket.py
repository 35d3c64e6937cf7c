"""What a model's ranks send is what the formula says, counted by the kernel at every socket of the process,
over each transport: payload, and so many bytes a message around it."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator

import pytest

from outsize.engine.model import Model
from outsize.forward import chain_costs, runahead
from outsize.forward.full import hidden
from outsize.forward.runahead import Chain
from outsize.forward.span import Span
from outsize.parallel.cuts import whole
from outsize.parallel.dropped import Drop
from outsize.parallel.points import Points
from outsize.parallel.split import Way
from outsize.parallel.transport import Transport
from tests.golden import tiny
from tests.parallel.sharded import Rank, opened, shards_of
from tests.parallel.test_transports import KINDS, over

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for TCP_INFO")
RECEIVED = 128  # where in TCP_INFO the bytes received are
AROUND = {
    "sockets": 16,
    "gloo": 144,
}  # bytes around a message: gloo asks for each before it is sent
TOKENS, ROW = 30, 2 * tiny.WIDTH


def connections() -> Iterator[tuple[str, int]]:
    """Every TCP connection's end in this process, and the bytes that have come in there."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as end:
                end.getpeername()
                info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                inode = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # no TCP, not connected, or closed meanwhile
        yield inode, struct.unpack_from("<Q", info, RECEIVED)[0]


def counted(transports: list[Transport], run: Callable[[], object]) -> tuple[int, int, int]:
    """Bytes at the sockets, payload and messages of all ranks while something runs; signs of life apart."""
    watches = {
        os.readlink(f"/proc/self/fd/{channel.sock.fileno()}")
        for t in transports
        for channel in _mesh(t).watch._channels.values()
    }
    before, wire = dict(connections()), [(t.wire.sent, t.wire.messages) for t in transports]
    run()
    after = dict(connections())
    came = sum(n - before.get(i, 0) for i, n in after.items() if i not in watches)
    sent = sum(t.wire.sent - s for t, (s, _) in zip(transports, wire, strict=True))
    return came, sent, sum(t.wire.messages - m for t, (_, m) in zip(transports, wire, strict=True))


def _mesh(t: Transport) -> object:
    return getattr(t, "_mesh", None) or t._small._mesh  # type: ignore[attr-defined]


LAYERS = tiny.LAYERS
CASES = {
    "sum": (Way("sum"), Points(), LAYERS, LAYERS * ROW),
    "heads": (Way("sum", "heads"), Points(), 2 * LAYERS, 2 * LAYERS * ROW),
    "dropped": (
        Way("sum", "heads"), Points(Drop(frozenset([0, 2]))), 2 * LAYERS - 2, (2 * LAYERS - 2) * ROW,
    ),
    "4 bits": (
        Way("sum"), Points(rest=4), LAYERS, LAYERS * (tiny.WIDTH // 2 + 2 * (tiny.WIDTH // 64)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_bytes_and_messages(case: str, kind: str, open_tiny: Callable[..., Model]) -> None:
    way, points, messages, row = CASES[case]
    packs = shards_of(open_tiny("llama+wide", "q4_0").pack, (2.0, 1.0), way)
    transports = over(kind, 2)
    with opened(packs, transports=transports, points=lambda _: points) as on_all:

        def run(rank: Rank) -> None:
            hidden(rank.model, [(Span(0, tiny.TOKENS[:TOKENS]), rank.model.new_kv())])

        at_sockets, sent, num = counted(transports, lambda: on_all(run))
    assert (sent, num) == (2 * TOKENS * row, 2 * messages)
    around = at_sockets - sent
    assert around == num * AROUND["gloo" if kind == "gloo" else "sockets"], "these are short"
    if kind != "gloo":
        assert around == sum(t.wire.overhead for t in transports)
    for t in transports:
        t.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain(kind: str, open_tiny: Callable[..., Model]) -> None:
    """Keys and values of each layer, of all tokens up to the first rank's last."""
    pack, tokens = open_tiny("llama+wide", "q4_0").pack, (tiny.TOKENS * 8)[:200]
    transports, found = over(kind, 2), list[int]()
    with opened([pack] * 2, transports=transports) as on_all:

        def run(rank: Rank) -> None:
            rank.model.chunk = 32
            if rank.number:
                runahead.follow(rank.model, transports[1])
                return
            chain_costs.hear(rank.model, transports[0])
            found.append(transports[1].wire.sent)
            lead = Chain(transports[0], lambda _, units, __: whole(units, (3, 2)))
            lead(rank.model, [Span(0, tokens)], [rank.model.new_kv()])
            found.extend([transports[0].wire.received, lead.cuts[0]])
            lead.end()

        at_sockets, sent, num = counted(transports, lambda: on_all(run))
    d = pack.description
    each = d.num_layers * 2 * d.num_kv_heads * d.head_dim * 2
    assert transports[1].wire.sent - found[0] == found[2] * each + len("ended")
    assert 0 < (at_sockets - sent) <= num * max(AROUND.values()) + 64
    for t in transports:
        t.close()
