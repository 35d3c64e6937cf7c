"""What a leader tells the ranks that follow it: whole numbers of 64 bits, FRAME of them, and the rest in a
second message, where there are more; and entries of its caches."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from outsize.kv.kv import KV
from outsize.parallel.rooms import as_bytes
from outsize.parallel.transport import Transport, others

FRAME = 64  # whole numbers: a token, or a draft, of a few sequences
END, ENDED = -1, b"ended"
AT_ONCE = 256  # positions whose entries are sent together


def send(transport: Transport, to: Sequence[int], words: Sequence[int]) -> None:
    """To some ranks. Raises PeerError."""
    framed = array("q", [len(words), *words])
    framed.extend([0] * (FRAME - len(framed)))
    send_all(transport, to, memoryview(framed)[:FRAME].cast("B"))
    if len(framed) > FRAME:
        send_all(transport, to, memoryview(framed)[FRAME:].cast("B"))


def send_all(transport: Transport, to: Sequence[int], out: memoryview) -> None:
    for sending in [transport.send(rank, out) for rank in to]:
        sending.wait()


def receive(transport: Transport, leader: int) -> array[int]:
    """Raises PeerError."""
    frame = array("q", bytes(8 * FRAME))
    transport.receive(leader, memoryview(frame).cast("B"))
    size = frame[0]
    if size >= FRAME:
        rest = array("q", bytes(8 * (size + 1 - FRAME)))
        transport.receive(leader, memoryview(rest).cast("B"))
        frame.extend(rest)
    return frame[1 : 1 + size]


def end(transport: Transport) -> None:
    """Tell the others that no step comes any more, and hear that they know. Raises PeerError."""
    peers = others(transport.rank, transport.world)
    send(transport, peers, [END])
    for rank in peers:
        transport.receive(rank, bytearray(len(ENDED)))


def ended(transport: Transport, leader: int) -> None:
    """Say that this rank knows."""
    transport.send(leader, ENDED).wait()


def send_entries(transport: Transport, to: Sequence[int], kv: KV, positions: range) -> None:
    """All layers' entries of some positions."""
    for at in range(positions.start, positions.stop, AT_ONCE):
        (block,) = kv.blocks(at, min(AT_ONCE, positions.stop - at), 1)
        send_all(transport, to, as_bytes(block))


def receive_entries(transport: Transport, of: int, kv: KV, positions: range) -> None:
    """What another rank sends of its cache, in place of what is there from the first of them on."""
    kv.truncate(positions.start)
    layers, num_heads, _, width = kv.like.shape
    for at in range(positions.start, positions.stop, AT_ONCE):
        size = min(AT_ONCE, positions.stop - at)
        block = kv.like.new_empty(layers, num_heads, size, width)
        transport.receive(of, as_bytes(block))
        kv.append_block(block)
