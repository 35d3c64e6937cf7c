"""That the ranks of a relay compute different chunks of a prompt at once, whatever the size of messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from outsize.errors import PeerError
from outsize.forward.relay import Relay
from outsize.kernels.plain import PLAIN
from outsize.kernels.rows import Rows
from outsize.model.paged import PagedLayer
from outsize.model.ranks import Chunk
from outsize.model.step import Step
from outsize.parallel.transport import Transport
from tests.parallel.ranks import on_all
from tests.parallel.test_transports import KINDS, over

WAIT_S = 20.0
LARGE = 4 << 20  # numbers of a chunk: 16 MiB, far more than a socket of this kernel takes at once


@dataclass
class Fake:
    """A layer that calls a function with each chunk's number, and adds one to its rows."""

    told: Callable[[int], None]
    seen: int = 0

    def run(self, chunks: Sequence[Chunk]) -> None:
        for h_TD, _ in chunks:
            self.told(self.seen)
            self.seen += 1
            h_TD += 1


def layer(told: Callable[[int], None]) -> PagedLayer:
    fake = Fake(told)
    return PagedLayer(lambda _: fake, None)


def chunks_of(count: int, width: int) -> list[Chunk]:
    step = Step(Rows([], True), {}, PLAIN)
    rows = torch.zeros(2 * count, width, dtype=torch.float32, device="cpu")
    return [(piece, step) for piece in rows.split(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_compute_at_once(kind: str) -> None:
    """The first rank is in its second chunk until the second one has begun with the first."""
    begun, transports = threading.Event(), over(kind, 2)

    def at(rank: int) -> Callable[[int], None]:
        def told(number: int) -> None:
            if rank:
                begun.set()
            elif number:
                assert begun.wait(WAIT_S), "the second rank waits for the first to be done"

        return told

    def run(t: Transport) -> Tensor:
        chunks = chunks_of(2, LARGE // 2)
        Relay(t).run([layer(at(t.rank))], chunks, [[], [slice(1, 2)]])
        return torch.cat([h[:, 0] for h, _ in chunks])

    found = on_all(transports, run)[0].tolist()
    assert found == [1, 1, 1, 2], "of the leader's rows the one that is wanted came back"
    assert [t.wire.sent for t in transports] == [8 * LARGE, 2 * LARGE]
    for t in transports:
        t.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_lost(kind: str) -> None:
    """What waits for it in a thread is an error here."""
    transports = over(kind, 2)

    def run(t: Transport) -> None:
        if t.rank:
            t.close()
            return
        with pytest.raises(PeerError):
            Relay(t).run([layer(lambda _: None)], chunks_of(3, LARGE), [[], [], [slice(1, 2)]])

    on_all(transports, run)
    transports[0].close()
