"""Each rank has some of the layers, in a row: rows pass from one to the next, and from the last back to the
first, which has the embedding and the head: of these only the rows whose logits are wanted. Two messages a
token between two ranks; the residual stream is sent as it is, in fp32, so n ranks give the bits of one.

Of a long prompt each chunk goes on as soon as a rank has run its layers over it, while that rank computes the
next: chunk 2 needs the keys of chunk 1 in the same layers, not its residual stream. Threads of its own send
and receive meanwhile, since what the kernel has no room for moves only while somebody asks it to. Where
weights are read at each use, a rank runs all chunks before they go on, so that each layer is read once.

Bytes of a step: 4 D for each row from each rank to the next, and for each row that is wanted from the last to
the first; a message for each chunk, of those back only for chunks of which rows are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from torch import Tensor

from outsize.model.paged import PagedLayer
from outsize.model.ranks import Chunk, Wanted
from outsize.parallel.lane import Line
from outsize.parallel.rooms import as_bytes
from outsize.parallel.transport import Transport

Job = Callable[[], Tensor]
Run = Callable[[Job], "Future[Tensor]"]


class Relay:
    """A rank's place between the one before it and the one after it."""

    def __init__(self, transport: Transport) -> None:
        rank, world = transport.rank, transport.world
        self._transport, self._rank, self._world = transport, rank, world
        self._before, self._after = (rank - 1) % world, (rank + 1) % world

    @property
    def begins(self) -> bool:
        """Does it look embeddings up?"""
        return self._rank == 0

    def run(self, layers: Sequence[PagedLayer], chunks: Sequence[Chunk], wanted: Wanted) -> None:
        """All chunks through this rank's layers and the others'. Changes their h_TD: of the first rank those
        that are wanted are the model's in the end. Raises PeerError."""
        apart = all(layer.is_resident for layer in layers)
        groups = [[n] for n in range(len(chunks))] if apart else [[*range(len(chunks))]]
        sent = list[Future[Tensor]]()
        with _lines(beside=len(groups) > 1) as (receiving, sending):
            coming = [receiving(self._receive(h_TD)) for h_TD, _ in chunks] if self._rank else []
            for group in groups:
                for n in group if coming else ():
                    coming[n].result()
                for layer in layers:
                    layer([chunks[n] for n in group])
                sent += [sending(job) for n in group for job in self._on(chunks[n][0], wanted[n])]
            for one in sent:
                one.result()
        if self._rank == 0 and self._world > 1:
            self._back(chunks, wanted)

    def _receive(self, into: Tensor) -> Job:
        def receive() -> Tensor:
            self._transport.receive(self._before, as_bytes(into))
            return into

        return receive

    def _on(self, h_TD: Tensor, wanted: Sequence[slice]) -> Iterator[Job]:
        """What of a chunk goes to the next rank: all, but to the first what is wanted."""
        if self._world > 1 and (self._after or wanted):
            out = _some(h_TD, wanted) if self._after == 0 else h_TD
            yield lambda: self._send(out)

    def _send(self, out: Tensor) -> Tensor:
        self._transport.send(self._after, as_bytes(out)).wait()
        return out

    def _back(self, chunks: Sequence[Chunk], wanted: Wanted) -> None:
        for (h_TD, _), some in zip(chunks, wanted, strict=True):
            if some:
                came = _some(h_TD, some)
                self._transport.receive(self._before, as_bytes(came))
                for rows, piece in zip(
                    some, came.split([s.stop - s.start for s in some]), strict=True
                ):
                    h_TD[rows] = piece


def _some(h_TD: Tensor, rows: Sequence[slice]) -> Tensor:
    """In one block of its own."""
    return torch.cat([h_TD[some] for some in rows])


@contextmanager
def _lines(beside: bool) -> Iterator[tuple[Run, Run]]:
    """What runs receives, and what runs sends: threads `beside` this one, or at once, here."""
    if not beside:
        yield _at_once, _at_once
        return
    both = Line(), Line()
    try:
        yield both[0].run, both[1].run
    finally:
        for line in both:
            line.close()


def _at_once(job: Job) -> Future[Tensor]:
    done: Future[Tensor] = Future()
    done.set_result(job())
    return done
