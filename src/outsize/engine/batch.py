"""Continuous batching: requests join and leave between steps, and each gets the bits it would get alone.

Each step runs every reply that is being written, and slices of prompts up to what `Pace` allows. A request
joins when there is room for the keys and values of its prompt and GRAIN tokens more; when replies outgrow the
room, the youngest is put aside in a file and goes on later (orca, OSDI 2022; chunked prefill, arXiv
2308.16369). In-process calls and the server run through this.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from outsize.engine.drive import Flow, first, following, run
from outsize.engine.pace import Pace
from outsize.engine.request import Request
from outsize.engine.scheduler import Scheduler
from outsize.engine.swap import Swapped
from outsize.errors import DiskFullError
from outsize.forward.chunked import split
from outsize.forward.span import Out, Span

GRAIN = 256  # tokens that a request may grow by before it is asked for again
PATIENCE = 8  # steps that a prompt waits at most while shorter ones go first
STRETCH = 1.4  # of a step by drafts, where people read along: they cost the others' gaps
SHARE_OF_ROWS = 8  # bytes of scratch for a number of logits
_numbers = count()


@dataclass(slots=True)
class Live:
    """A request in the batch."""

    request: Request
    flow: Flow | None = None  # None: not begun
    span: Span | None = None  # what it asks for next
    number: int = field(default_factory=lambda: next(_numbers))  # in the order of coming
    passed: int = 0  # steps in which its prompt was not run
    swapped: Swapped | None = None

    @property
    def need(self) -> int:
        """Tokens of keys and values that it may have before it is looked at again."""
        seq = self.request.seq
        return min(seq.limit, max(seq.num_prompt, len(seq.tokens)) + GRAIN)


class Batch:
    """Requests that share steps. One thread uses it at a time."""

    def __init__(
        self,
        scheduler: Scheduler,
        streams: int | None = None,
        pace: Pace | None = None,
    ) -> None:
        """`streams`: the most that run at once. `pace`: slices long prompts, and keeps steps even; None: a
        prompt is one step, and drafts are as long as pays."""
        self._scheduler, self._streams = scheduler, streams
        self._pace, self.prefixes = pace, scheduler.prefixes
        scheduler.company.stretch = None if pace is None else STRETCH
        self.waiting, self.running = list[Live](), list[Live]()
        self.beside = 0  # tokens whose keys and values are in memory for others than these
        self.failed: dict[int, Exception] = {}  # by the id of a request, until it is taken out

    def add(self, request: Request) -> None:
        """Take a request on: it joins as soon as there is room."""
        self.waiting.append(Live(request))

    def step(self) -> list[Request]:
        """One step; the requests that it ran. None: nothing is left to do."""
        return self._scheduler.take(self._step)

    def check(self) -> None:
        """Raise what one of the requests failed with, if any did."""
        for error in self.failed.values():
            raise error

    @property
    def is_empty(self) -> bool:
        return not self.waiting and not self.running

    @property
    def used(self) -> int:
        """Tokens of room that are taken or asked for."""
        return self._asked + (0 if self.prefixes is None else self.prefixes.tokens)

    @property
    def _asked(self) -> int:
        """As `used`, without what may be forgotten."""
        apart = self._scheduler.apart([live.request.kv for live in self.running])
        return self.beside + apart + sum(live.need for live in self.running)

    @property
    def room(self) -> int:
        """Tokens whose keys and values the plan has memory for."""
        return self._scheduler.placement.kv_tokens

    @property
    def stored(self) -> int:
        """Tokens whose keys and values are in memory."""
        kept = 0 if self.prefixes is None else self.prefixes.tokens
        return kept + sum(live.request.kv.length for live in self.running)

    def close(self) -> None:
        """Let go of everything that is under way."""
        for live in [*self.running, *self.waiting]:
            self._release(live, keep=False)
        self.running, self.waiting = [], []

    def _step(self) -> list[Request]:
        self.drop_ended()
        self._put_aside()
        self._admit()
        chosen = list(self._chosen())
        if not chosen:
            self.drop_ended()  # what could not begin
            return []
        model, drafting = self._scheduler.transformer, self._scheduler.drafting
        started, waited = time.perf_counter(), model.waited_s
        spans = [part for _, part, _ in chosen]
        kvs = [live.request.kv for live, _, _ in chosen]
        outs = run(model, spans, kvs, drafting.step_times, self._scheduler.forward)
        self._learn(spans, time.perf_counter() - started, model.waited_s - waited)
        before = sum(len(live.request.seq.tokens) for live, _, _ in chosen)
        is_narrow = all(span.is_narrow for span in spans)
        self._scheduler.company.meets(len(chosen) - 1, not is_narrow)
        for (live, _, rest), out in zip(chosen, outs, strict=True):
            self._hand_out(live, rest, out)
        gained = sum(len(live.request.seq.tokens) for live, _, _ in chosen) - before
        if is_narrow:
            self._scheduler.company.saw(gained)
        self.drop_ended()
        self._scheduler.keep_budget()
        return [live.request for live, _, _ in chosen]

    def _learn(self, spans: list[Span], seconds: float, waited: float) -> None:
        if self._pace is not None and not any(span.is_lazy for span in spans):
            prompt = sum(s.num_rows for s in spans if not s.is_narrow)
            self._pace.saw(prompt, sum(s.is_narrow for s in spans), seconds, waited)

    def _hand_out(self, live: Live, rest: Span | None, out: Out) -> None:
        """Give a flow what it asked for, once it has all of it."""
        live.passed, request = 0, live.request
        if rest is not None:
            live.span, request.known = rest, rest.start
            return
        assert live.flow is not None
        try:
            live.span = next(iter(following(live.flow, out)), None)
        except Exception as e:
            self._fail(live, e)
        request.known = min(len(request.seq.tokens) - 1, request.kv.length)
        request.computed = request.kv.computed

    def _chosen(self) -> Iterator[tuple[Live, Span, Span | None]]:
        """What the next step runs: (whose, what, what is left of it)."""
        replies, prompts = list[tuple[Live, Span]](), list[tuple[Live, Span]]()
        for live in self.running:
            if live.span is not None:
                (replies if live.span.is_narrow else prompts).append((live, live.span))
        yield from self._replies(replies)
        yield from self._prompts(prompts, len(replies))

    def _replies(self, found: list[tuple[Live, Span]]) -> Iterator[tuple[Live, Span, None]]:
        """Those that wait longest first, as many as there is memory for their logits."""
        model, placement = self._scheduler.transformer, self._scheduler.placement
        size = SHARE_OF_ROWS * model.description.vocab_size
        left, is_first = placement.fixed["scratch"] // size, True
        for live, span in sorted(found, key=lambda pair: -pair[0].passed):
            left -= span.num_rows
            if left >= 0 or is_first:
                yield live, span, None
            else:
                live.passed += 1
            is_first = False

    def _prompts(
        self, found: list[tuple[Live, Span]], replies: int
    ) -> Iterator[tuple[Live, Span, Span | None]]:
        """Slices, the shortest rest first, but nobody waits for more than PATIENCE steps."""
        chunk = self._scheduler.transformer.chunk
        left = None if self._pace is None else self._pace.room(replies, chunk)
        found.sort(key=lambda p: (p[0].passed < PATIENCE, len(p[1].tokens), p[0].number))
        for live, span in found:
            if left is None:
                yield live, span, None
                continue
            if left <= 0:
                live.passed += 1
                continue
            part, rest = split(span, left, chunk)
            left -= len(part.tokens)
            yield live, part, rest

    def _admit(self) -> None:
        """Begin what waits, in order, as far as there is room."""
        for live in sorted(self.waiting, key=lambda live: live.number):
            if self._streams is not None and len(self.running) >= self._streams:
                return
            if self._is_coming(live):
                continue
            if not self._has_room(live.need):
                return
            left = self.room - self._asked - live.need
            take = self.prefixes is not None and self.prefixes.make_room(live.request, left)
            self.waiting.remove(live)
            self.running.append(live)
            self._begin(live, take)

    def _is_coming(self, live: Live) -> bool:
        """Is a longer beginning of its prompt being computed for another request? Then it waits for that."""
        if self.prefixes is None or live.flow is not None:
            return False
        return self.prefixes.is_coming(live.request, [other.request for other in self.running])

    def _has_room(self, need: int) -> bool:
        """For what is asked, whatever is kept. One that is alone always has."""
        return not self.running or self._asked + need <= self.room

    def _begin(self, live: Live, take: bool) -> None:
        """`take`: what is cached of its prompt is moved, as there is no room for a copy."""
        request = live.request
        room = request.seq.limit + self._scheduler.drafting.spare
        try:
            if live.swapped is not None:
                live.swapped.restore(request.kv, room)
                live.swapped = None
            if live.flow is None:
                request.kv.give_room(room)
                if self.prefixes is not None:
                    self.prefixes.use(request, [other.request for other in self.running], take)
                live.flow = self._scheduler.flow(request)
                live.span = next(iter(first(live.flow)), None)
        except Exception as e:
            request.known = 0
            self._fail(live, e)

    def _fail(self, live: Live, error: Exception) -> None:
        """What went wrong with one request, as its grammar or drafter may, is that request's alone."""
        self.failed[id(live.request)], live.span = error, None
        live.request.seq.finish = live.request.seq.finish or "cancelled"

    def _put_aside(self) -> None:
        """Replies that have outgrown the room: the youngest goes on later, from a file."""
        while self.used > self.room and len(self.running) > 1:
            if self.prefixes is not None and self.prefixes.forget():
                continue
            youngest = max(self.running, key=lambda live: live.number)
            self.running.remove(youngest)
            self.waiting.append(youngest)
            try:
                youngest.swapped = Swapped(youngest.request.kv)
            except DiskFullError as e:
                youngest.request.known = 0  # some of its keys and values are lost
                self._fail(youngest, e)
                self.drop_ended()

    def drop_ended(self) -> None:
        """Those that are complete, were cancelled, or failed."""
        for group in (self.running, self.waiting):
            for live in [live for live in group if live.request.seq.finish is not None]:
                group.remove(live)
                self._release(live, keep=live.swapped is None)

    def _release(self, live: Live, keep: bool) -> None:
        if live.flow is not None:
            live.flow.close()
        if live.swapped is not None:
            live.swapped.close()
        if keep and self.prefixes is not None and live.flow is not None:
            self.prefixes.keep(live.request, live.request.keeps)
        # Whoever still reads the reply would hold memory that others are given.
        live.request.kv = live.request.kv.emptied()
