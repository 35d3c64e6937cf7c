"""One rank leads: it decides what each step runs, tells the others, and all run it together.

What decides (drafts, samplers, schedulers, a clock, Ctrl-C) is on the leader alone; ranks that decided for
themselves would differ one day, and wait for each other for ever. The others mirror the leader's caches by
number and run the same rows through the layers; logits are the leader's. Where a cache has entries that no
step made (of a prompt that was kept), the leader sends them along.

A step is FRAME whole numbers of 64 bits, and the rest of them, where there are more: how many there are, how
many caches are done with, these; then for each sequence its cache, the position from which the cache is
behind, the first position of its tokens, their number, and they.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from weakref import WeakKeyDictionary

from outsize.errors import OptionError, PeerError
from outsize.forward.full import hidden
from outsize.forward.span import Span
from outsize.kv.kv import ALL, KV
from outsize.model.transformer import Transformer
from outsize.parallel.rooms import as_bytes
from outsize.parallel.transport import Transport, Wire, others
from outsize.system.interrupts import put_off

FRAME = 64  # whole numbers: a token, or a draft, of a few sequences
AT_ONCE = 256  # positions whose entries are sent together
END, ENDED = -1, b"ended"
Pair = tuple[Span, KV]


class Lead:
    """What the leader's model calls for each step."""

    def __init__(self, transport: Transport, is_whole: bool = True) -> None:
        """`is_whole`: does each rank have all key heads?"""
        self._transport, self._is_whole = transport, is_whole
        self._numbers: WeakKeyDictionary[KV, int] = WeakKeyDictionary()
        self._known: dict[int, int] = {}  # positions that the others have
        self._done: list[int] = []
        self._fresh = count()
        self._broken = ""

    @property
    def wire(self) -> Wire:
        """What was sent and received: of steps, and within them."""
        return self._transport.wire

    @contextmanager
    def step(self, pairs: Sequence[tuple[Span, KV]]) -> Iterator[None]:
        """Around a step of this rank: the others are told of it. It is not interrupted in the middle: the
        others would wait. Raises PeerError, OptionError."""
        if self._broken:
            raise PeerError(f"the ranks no longer run together ({self._broken}); start them again")
        _check(pairs)
        with put_off():
            try:
                self._tell(pairs)
                yield
            except BaseException as e:
                self._broken = str(e) or type(e).__name__
                raise

    def end(self) -> None:
        """Tell the others that no step comes any more, and hear that they know. Raises PeerError."""
        if not self._broken:
            self._broken = "they have ended"
            self._send(array("q", [END]))
            for rank in others(self._transport.rank, self._transport.world):
                self._transport.receive(rank, bytearray(len(ENDED)))

    def _tell(self, pairs: Sequence[Pair]) -> None:
        done, self._done = self._done, []
        words, behind = array("q", [len(done), *done]), []
        for span, kv in pairs:
            number = self._number(kv)
            known = min(self._known.get(number, 0), kv.moved, span.start)
            if known < span.start and not self._is_whole:
                raise OptionError(
                    "a kept prompt goes on with keys that each rank has in part, which are not sent; use "
                    "attention=whole, or --prefix-cache off"
                )
            kv.moved, self._known[number] = ALL, span.start + len(span.tokens)
            behind.append((kv, known, span.start))
            words.extend([number, known, span.start, len(span.tokens), *span.tokens])
        self._send(words)
        for kv, known, start in behind:
            self._send_entries(kv, known, start)

    def _number(self, kv: KV) -> int:
        found = self._numbers.get(kv)
        if found is None:
            found = self._numbers[kv] = next(self._fresh)
            weakref.finalize(kv, self._forget, found).atexit = False
        return found

    def _forget(self, number: int) -> None:
        self._known.pop(number, None)
        self._done.append(number)

    def _send(self, words: array[int]) -> None:
        framed = array("q", [len(words), *words])
        framed.extend([0] * (FRAME - len(framed)))
        self._send_all(memoryview(framed)[:FRAME].cast("B"))
        if len(framed) > FRAME:
            self._send_all(memoryview(framed)[FRAME:].cast("B"))

    def _send_entries(self, kv: KV, known: int, start: int) -> None:
        for at in range(known, start, AT_ONCE):
            (block,) = kv.blocks(at, min(AT_ONCE, start - at), 1)
            self._send_all(as_bytes(block))

    def _send_all(self, out: memoryview) -> None:
        to = others(self._transport.rank, self._transport.world)
        for sending in [self._transport.send(rank, out) for rank in to]:
            sending.wait()


def _check(pairs: Sequence[Pair]) -> None:
    """Raises OptionError for what the others are not told of."""
    for span, _ in pairs:
        if span.masks is not None or span.is_lazy or span.adapter is not None:
            what = "drafts with masks" if span.masks is not None else "adapters"
            what = "lazy prompts" if span.is_lazy else what
            raise OptionError(f"{what} are not run by several ranks; leave them out, or --ranks")


def follow(model: Transformer, transport: Transport, leader: int = 0) -> None:
    """Run the leader's steps until it ends. Raises PeerError."""
    kvs: dict[int, KV] = {}
    while (words := _receive(transport, leader))[0] != END:
        done, at = words[1 : 1 + words[0]], 1 + words[0]
        for number in done:
            kvs.pop(number, None)
        pairs: list[Pair] = []
        behind = []
        while at < len(words):
            number, known, start, size = words[at : at + 4]
            tokens, at = words[at + 4 : at + 4 + size].tolist(), at + 4 + size
            if number not in kvs:
                kvs[number] = model.new_kv()
            kv = kvs[number]
            behind.append((kv, known, start))
            pairs.append((Span(start, tokens, 0), kv))
        for kv, known, start in behind:
            _receive_entries(transport, leader, kv, known, start)
        with model.threads.narrow(all(span.is_narrow for span, _ in pairs)):
            hidden(model, pairs)
    transport.send(leader, ENDED).wait()


def _receive(transport: Transport, leader: int) -> array[int]:
    frame = array("q", bytes(8 * FRAME))
    transport.receive(leader, memoryview(frame).cast("B"))
    size = frame[0]
    if size >= FRAME:
        rest = array("q", bytes(8 * (size + 1 - FRAME)))
        transport.receive(leader, memoryview(rest).cast("B"))
        frame.extend(rest)
    return frame[1 : 1 + size]


def _receive_entries(transport: Transport, leader: int, kv: KV, known: int, start: int) -> None:
    kv.truncate(known)
    layers, num_heads, _, width = kv.like.shape
    for at in range(known, start, AT_ONCE):
        size = min(AT_ONCE, start - at)
        block = kv.like.new_empty(layers, num_heads, size, width)
        transport.receive(leader, as_bytes(block))
        kv.append_block(block)
