"""A reply on its way: an iterator over its pieces."""

from __future__ import annotations

import time
from collections.abc import Iterator

from outsize.engine.batch import Batch
from outsize.engine.reply import Reply
from outsize.engine.request import Request
from outsize.engine.scheduler import Scheduler
from outsize.text.channels import REASONING, TEXT, Piece


class Streaming:
    """Pieces of a reply as they come; `reply` is the whole of it with its usage statistics, complete once the
    pieces have ended. `parts` gives what the model thinks, too."""

    def __init__(self, scheduler: Scheduler, request: Request, started: float) -> None:
        self._scheduler, self.request = scheduler, request
        self._started, self._before = started, scheduler.counts()
        self.parts = self._go()  # ("text" or "reasoning", piece)
        self._pieces = (piece for kind, piece in self.parts if kind == TEXT)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _go(self) -> Iterator[Piece]:
        request, batch = self.request, Batch(self._scheduler)
        batch.add(request)
        while batch.step():
            batch.check()
            yield from self._new()
        batch.check()
        yield from self._new()  # what a reply held back that was cancelled

    def _new(self) -> Iterator[Piece]:
        """What the last step added."""
        request, before = self.request, len(self.request.stream.reasoning)
        piece = request.advance(time.perf_counter(), self._scheduler.bytes_read)
        if thought := request.stream.reasoning[before:]:
            yield REASONING, thought
        if piece:
            yield TEXT, piece

    def cancel(self) -> None:
        """End the reply after the present step."""
        self.request.seq.finish = self.request.seq.finish or "cancelled"

    @property
    def reply(self) -> Reply:
        self._scheduler.settle()
        return self._scheduler.reply(self.request, self._started, self._before)
