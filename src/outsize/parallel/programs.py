"""What ranks do, as programs for the simulator: tensor parallelism, prompts over a chain, and its baselines.

A prompt's costs are two measured numbers: seconds a token, and seconds a pair of a query and a key.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from outsize.parallel.des import Compute, Op, Program, Receive, Send
from outsize.parallel.transport import others

WORD, FRAME = 8, 512  # bytes of a number, and of a step's first message
ABOUT = 8  # numbers of a step of one sequence beside its tokens


def told(tokens: int) -> list[int]:
    """Bytes of the messages that tell the others of a step of one sequence (forward/lead.py)."""
    size = WORD * (ABOUT + tokens)
    return [FRAME, size - FRAME] if size > FRAME else [FRAME]


def telling(tokens: int, rank: int, world: int) -> list[Op]:
    """The same, as this rank sends or receives them."""
    if rank:
        return [Receive(0, size) for size in told(tokens)]
    return [Send(r, size) for size in told(tokens) for r in range(1, world)]


@dataclass(frozen=True)
class Layer:
    """Measured on one rank's share: seconds of a layer's sub-layers for the rows of one message."""

    attention_s: float
    ffn_s: float


def exchange(rank: int, world: int, size: int) -> list[Op]:
    """All to all: everyone's message to everyone."""
    peers = others(rank, world)
    return [*(Send(r, size) for r in peers), *(Receive(r, size) for r in peers)]


@dataclass(frozen=True)
class Tensor:
    """A pass by tensor parallelism, direct exchanges. `size`: bytes of a message; `whole`: every rank
    computes all of attention and only feed-forwards are summed; `dropped`: layers with one sum. `chunks`: of
    rows that follow each other through a layer; with `overlap` a chunk's sum is under way while the next is
    computed."""

    layers: int
    each: Layer
    size: int
    whole: bool = False
    dropped: Collection[int] = ()
    chunks: int = 1
    overlap: bool = False
    last_s: float = 0.0  # after the layers: the head

    def program(self, rank: int, world: int) -> Program:
        ops: list[Op] = []
        for layer in range(self.layers):
            summed = not self.whole and layer not in self.dropped
            ops += self._sublayer(self.each.attention_s, summed, rank, world)
            ops += self._sublayer(self.each.ffn_s, True, rank, world)
        return [*ops, Compute(self.last_s, "head")]

    def token(self, rank: int, world: int) -> Program:
        """The same, of one token, with what the leader tells the others before."""
        return [*telling(1, rank, world), *self.program(rank, world)]

    def _sublayer(self, seconds: float, summed: bool, rank: int, world: int) -> list[Op]:
        ops: list[Op] = []
        late: list[Op] = []
        for _ in range(self.chunks):
            ops.append(Compute(seconds))
            if summed:
                peers = others(rank, world)
                ops += [Send(r, self.size) for r in peers]
                here: list[Op] = [Receive(r, self.size) for r in peers]
                ops += [] if self.overlap else here
                late += here if self.overlap else []
        return ops + late


@dataclass(frozen=True)
class Prompt:
    """`linear_s`: seconds a token; `pair_s`: seconds a (query, key) pair, all layers together; `before`: the
    share of a token's linear work that its keys and values need (norm, q, k, v); `kv_bytes`: of a token's
    keys and values in one layer; `row_bytes`: of a token's hidden row."""

    linear_s: float
    pair_s: float
    layers: int
    kv_bytes: int
    row_bytes: int
    before: float = 0.15

    def seconds(self, start: int, tokens: int) -> float:
        """Of all layers, for tokens after `start` others."""
        return self.linear_s * tokens + self.pair_s * tokens * (start + tokens / 2)

    def part(self, share: float) -> Prompt:
        """Of a rank that has such a share of the layers."""
        return replace(self, linear_s=self.linear_s * share, pair_s=self.pair_s * share)

    def qkv(self, tokens: int) -> float:
        return self.before * self.linear_s * tokens / self.layers

    def rest(self, start: int, tokens: int) -> float:
        return self.seconds(start, tokens) / self.layers - self.qkv(tokens)


def alone(prompt: Prompt, tokens: int) -> Program:
    return [Compute(prompt.seconds(0, tokens))]


def runahead(prompt: Prompt, cuts: Sequence[int], rank: int, speed: float = 1.0) -> Program:
    """KV-Runahead (arXiv 2405.05329): rank r computes cuts[r] tokens, and hands on the keys and values of all
    tokens up to its own, layer by layer."""
    ends, last = list(accumulate(cuts)), rank == len(cuts) - 1
    start, ops = ends[rank] - cuts[rank], list[Op]()
    for _ in range(prompt.layers):
        ops.append(Compute(prompt.qkv(cuts[rank]) / speed, "qkv"))
        if rank:
            ops.append(Receive(rank - 1, start * prompt.kv_bytes))
        if not last:
            ops.append(Send(rank + 1, ends[rank] * prompt.kv_bytes))
        ops.append(Compute(prompt.rest(start, cuts[rank]) / speed, "attention"))
    return ops


def gathered(prompt: Prompt, tokens: int, rank: int, world: int, zigzag: bool = False) -> Program:
    """The paper's baseline: an even share each, and all keys and values to all in every layer. `zigzag`: two
    shares each, an early and a late one, so that all attend to as many keys."""
    share = tokens // world
    if zigzag:
        half = tokens // (2 * world)
        late = 2 * world - 1 - rank
        rest = prompt.rest(rank * half, half) + prompt.rest(late * half, half)
    else:
        rest = prompt.rest(rank * share, share)
    layer = [Compute(prompt.qkv(share), "qkv"), *exchange(rank, world, share * prompt.kv_bytes)]
    return [*layer, Compute(rest, "attention")] * prompt.layers


def relay(
    prompt: Prompt, tokens: int, rank: int, world: int, chunk: int = 256, wanted: int = 1
) -> Program:
    """A pipeline over layers (forward/relay.py), chunks follow each other. `prompt`: of this rank's layers;
    `wanted`: of how many of the last tokens the rows go back to the leader."""
    ops = telling(tokens, rank, world) if world > 1 else []
    last, back = rank == world - 1, list[Op]()
    for start in range(0, tokens, chunk):
        some = min(chunk, tokens - start)
        asked = max(0, start + some - max(start, tokens - wanted)) * prompt.row_bytes
        if rank:
            ops.append(Receive(rank - 1, some * prompt.row_bytes))
        ops.append(Compute(prompt.seconds(start, some)))
        if not last:
            ops.append(Send(rank + 1, some * prompt.row_bytes))
        elif rank and asked:
            ops.append(Send(0, asked))
        if rank == 0 and world > 1 and asked:
            back.append(Receive(world - 1, asked))
    return [*ops, *back]
