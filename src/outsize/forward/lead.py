"""One rank leads: it decides what each step runs, tells the others, and all run it together.

What decides (drafts, samplers, schedulers, a clock, Ctrl-C) is on the leader alone; ranks that decided for
themselves would differ one day, and wait for each other for ever. The others mirror the leader's caches by
number and run the same rows through the layers; logits are the leader's. Where a cache has entries that no
step made (of a prompt that was kept), the leader sends them along.

A step is whole numbers (words.py): how many caches are done with, these; then for each sequence its cache,
the position from which the cache is behind, its adapter, the first position of its tokens, how many of the
last ones' logits are wanted, their number, and they.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from weakref import WeakKeyDictionary

from outsize.errors import OptionError, PeerError
from outsize.forward import words
from outsize.forward.full import hidden
from outsize.forward.span import Span
from outsize.kv.kv import ALL, KV
from outsize.model.lora import Adapter
from outsize.model.transformer import Transformer
from outsize.parallel.transport import Transport, Wire, others
from outsize.system.interrupts import put_off

Pair = tuple[Span, KV]
ABOUT = 6  # whole numbers of a sequence before its tokens


class Leading:
    """A leader's end: what it has in common whatever it leads."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.adapters: Sequence[Adapter] = ()  # that the others have, too
        self._broken = ""

    @property
    def broken(self) -> str:
        """Why the ranks no longer run together; "" while they do."""
        return self._broken

    def renew(self) -> None:
        """The others have come again."""
        self._broken = ""

    @property
    def wire(self) -> Wire:
        """What this rank has sent and received."""
        return self._transport.wire

    def end(self) -> None:
        """Tell the others that nothing comes any more, and hear that they know. Raises PeerError."""
        if not self._broken:
            self._broken = "they have ended"
            words.end(self._transport)

    def check(self) -> None:
        """Raises PeerError where the ranks no longer run together."""
        if self._broken:
            raise PeerError(f"the ranks no longer run together ({self._broken}); start them again")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks do. It is not interrupted in the middle: the others would wait."""
        with put_off():
            try:
                yield
            except BaseException as e:
                self._broken = str(e) or type(e).__name__
                raise


class Lead(Leading):
    """What the leader's model calls for each step."""

    def __init__(self, transport: Transport, is_whole: bool = True) -> None:
        """`is_whole`: does each rank have all key heads?"""
        super().__init__(transport)
        self._is_whole = is_whole
        self._others = others(transport.rank, transport.world)
        self._numbers: WeakKeyDictionary[KV, int] = WeakKeyDictionary()
        self._known: dict[int, int] = {}  # positions that the others have
        self._done: list[int] = []
        self._fresh = count()

    def renew(self) -> None:
        """The others have come again, with nothing: they are sent what is needed with the next step."""
        self._numbers, self._known, self._done = WeakKeyDictionary(), {}, []
        super().renew()

    @contextmanager
    def step(self, pairs: Sequence[tuple[Span, KV]]) -> Iterator[None]:
        """Around a step of this rank: the others are told of it. Raises PeerError, OptionError."""
        self.check()
        _check(pairs, self.adapters)
        with self.together():
            self._tell(pairs)
            yield

    def _tell(self, pairs: Sequence[Pair]) -> None:
        done, self._done = self._done, []
        told, behind = array("q", [len(done), *done]), []
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
            adapter = numbered(span, self.adapters)
            told.extend([number, known, adapter, span.start, span.want])
            told.extend([len(span.tokens), *span.tokens])
        words.send(self._transport, self._others, told)
        for kv, known, start in behind:
            words.send_entries(self._transport, self._others, kv, range(known, start))

    def _number(self, kv: KV) -> int:
        found = self._numbers.get(kv)
        if found is None:
            found = self._numbers[kv] = next(self._fresh)
            weakref.finalize(kv, self._forget, found).atexit = False
        return found

    def _forget(self, number: int) -> None:
        self._known.pop(number, None)
        self._done.append(number)


def _check(pairs: Sequence[Pair], adapters: Sequence[Adapter]) -> None:
    """Raises OptionError for what the others are not told of."""
    for span, _ in pairs:
        if span.masks is not None or span.is_lazy:
            what = "drafts with masks" if span.masks is not None else "lazy prompts"
            raise OptionError(f"{what} are not run by several ranks; leave them out, or --ranks")
        numbered(span, adapters)


def numbered(span: Span, adapters: Sequence[Adapter]) -> int:
    """The place of a span's adapter among those that all ranks have, from 1 on; 0: it has none. Raises
    OptionError."""
    if span.adapter is None:
        return 0
    for number, adapter in enumerate(adapters, 1):
        if adapter is span.adapter:
            return number
    raise OptionError(
        f"adapter {span.adapter.name} was loaded after the ranks were, and the others do not have it; give "
        "it when the model is opened (--adapter)"
    )


def follow(model: Transformer, transport: Transport, adapters: Sequence[Adapter] = ()) -> None:
    """Run the leader's steps until it ends. `adapters`: in the leader's order. Raises PeerError."""
    leader = 0
    kvs: dict[int, KV] = {}
    while (told := words.receive(transport, leader))[0] != words.END:
        done, at = told[1 : 1 + told[0]], 1 + told[0]
        for number in done:
            kvs.pop(number, None)
        pairs: list[Pair] = []
        behind = []
        while at < len(told):
            number, known, adapter, start, want, size = told[at : at + ABOUT]
            tokens, at = told[at + ABOUT : at + ABOUT + size].tolist(), at + ABOUT + size
            if number not in kvs:
                kvs[number] = model.new_kv()
            kv = kvs[number]
            behind.append((kv, known, start))
            own = adapters[adapter - 1] if adapter else None
            pairs.append((Span(start, tokens, want, adapter=own), kv))
        for kv, known, start in behind:
            words.receive_entries(transport, leader, kv, range(known, start))
        with model.threads.narrow(all(span.is_narrow for span, _ in pairs)):
            hidden(model, pairs)
    words.ended(transport, leader)
