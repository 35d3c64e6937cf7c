"""The baseline of KV-Runahead (arXiv 2405.05329) in the engine: each rank computes an equal share of a
prompt's tokens, and in every layer all keys and values go to all ranks before anyone attends.

What a rank attends to is what it may see (the paper's baseline computes the rest, too, and masks it), so this
is the faster form of the two. A share is one chunk: logits and caches have the bits of one rank whose chunks
are as long. Every rank sends world - 1 times its own entries; all together (world - 1) * C * entry bytes a
layer, twice what a chain of even cuts sends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outsize.forward.full import full, hidden
from outsize.forward.span import Out, Span
from outsize.kv.kv import KV
from outsize.model.transformer import Transformer
from outsize.parallel.rooms import as_bytes
from outsize.parallel.transport import Transport, others


class Gathering(KV):
    """A cache to which a layer's entries of all ranks' tokens come at once."""

    def __init__(self, like: KV, transport: Transport, shares: Sequence[int]) -> None:
        """`shares`: tokens of each rank, in order of the prompt: rank 1 has the first, rank 0 the last."""
        super().__init__(len(like.positions), like.sizes[0], like.like.dtype, room=sum(shares))
        self._transport, self._shares = transport, shares

    def append(self, layer: int, k_TJE: Tensor, v_TJE: Tensor, positions: Sequence[int]) -> Tensor:
        own = torch.cat([k_TJE.to(self.like.dtype), v_TJE.to(self.like.dtype)], dim=1)
        own_CTE = own.transpose(0, 1).contiguous()
        num_heads, _, width = own_CTE.shape
        rank, world = self._transport.rank, self._transport.world
        came = {
            of: own_CTE.new_empty(num_heads, self._shares[place(of, world)], width)
            for of in others(rank, world)
        }
        self._transport.exchange(as_bytes(own_CTE), {of: as_bytes(t) for of, t in came.items()})
        for of in sorted(
            (r for r in range(world) if place(r, world) <= place(rank, world)), key=_last
        ):
            self.append_entries(layer, came.get(of, own_CTE))
        return self.view(layer)


def place(rank: int, world: int) -> int:
    """In order of the prompt."""
    return (rank - 1) % world


def _last(rank: int) -> int:
    return rank or 1 << 30


def run(model: Transformer, transport: Transport, tokens: Sequence[int]) -> tuple[Out, KV] | None:
    """This rank's share of a prompt, which all ranks are given; of rank 0 the logits after it, and a cache
    that has all of it. Of models whose layers all have caches alike. Raises PeerError."""
    world, count = transport.world, len(tokens)
    ends = [count * (i + 1) // world for i in range(world)]
    shares = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    mine = place(transport.rank, world)
    start, before = ends[mine] - shares[mine], model.chunk
    model.chunk = max(shares)
    kv = Gathering(model.new_kv(), transport, shares)
    span = Span(start, tokens[start : ends[mine]], 1 if transport.rank == 0 else 0)
    try:
        if transport.rank == 0:
            (out,) = full(model, [span], [kv])
            return out, kv
        with torch.inference_mode():
            hidden(model, [(span, kv)])
        return None
    finally:
        model.chunk = before
