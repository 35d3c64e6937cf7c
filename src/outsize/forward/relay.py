"""Each rank has some of the layers, in a row: rows pass from one to the next, and back to the first, which
has the embedding and the head. Two messages a token between two ranks; the residual stream is sent as it is,
in fp32, so n ranks give the bits of one.

Of a long prompt each chunk goes on as soon as a rank has run its layers over it, while that rank computes the
next: chunk 2 needs the keys of chunk 1 in the same layers, not its residual stream. Where weights are read at
each use, a rank runs all chunks before they go on, so that each layer is read once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from outsize.model.paged import PagedLayer
from outsize.model.step import Step
from outsize.parallel.rooms import as_bytes
from outsize.parallel.transport import Sending, Transport

Chunk = tuple[Tensor, Step]


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

    def run(self, layers: Sequence[PagedLayer], chunks: Sequence[Chunk]) -> None:
        """All chunks through this rank's layers and the others'. Changes their h_TD. Raises PeerError."""
        apart = all(layer.is_resident for layer in layers)
        sent = list[Sending]()
        for group in [[chunk] for chunk in chunks] if apart else [chunks]:
            for h_TD, _ in group if self._rank else ():
                self._transport.receive(self._before, as_bytes(h_TD))
            for layer in layers:
                layer(group)
            for h_TD, _ in group if self._world > 1 else ():
                sent.append(self._transport.send(self._after, as_bytes(h_TD)))
        for sending in sent:
            sending.wait()
        for h_TD, _ in chunks if self._rank == 0 and self._world > 1 else ():
            self._transport.receive(self._before, as_bytes(h_TD))
