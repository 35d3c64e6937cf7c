"""KV-Runahead (arXiv 2405.05329): a long prompt in parallel over a chain of ranks, each with the whole model.

The first rank of the chain computes the first tokens, the second those after them, and so on; layer by layer
each hands the keys and values of all tokens up to its own last one to the next, which needs nothing else of
the earlier ones. Nobody waits for those behind it, so early ranks run ahead. The leader is the last of the
chain: the whole cache ends with it, and it goes on alone, with single tokens, drafts, batches and all else.

Cuts are at multiples of the model's chunk: logits and caches have the bits of one rank. A layer's entries go
in messages of PIECE positions, of which a rank has up to WINDOW bytes under way, each way. Between a rank and
the next, of a prompt after `start` tokens that the leader had, all layers together: (end - base) * C * entry
bytes, where `end` is where the rank's part ends, and `base` is `start` towards the leader, else 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from outsize.forward import chain_costs, words
from outsize.forward.full import full, hidden
from outsize.forward.lazy import lazy
from outsize.forward.lead import Leading, numbered
from outsize.forward.span import Out, Span
from outsize.kv.kv import KV
from outsize.model.lora import Adapter
from outsize.model.paged import PagedLayer
from outsize.model.ranks import Chunk, Wanted
from outsize.model.transformer import Transformer
from outsize.parallel.cuts import Costs, Cuts
from outsize.parallel.lane import Line
from outsize.parallel.rooms import as_bytes
from outsize.parallel.transport import Transport

PIECE = 512  # positions of a message
WINDOW = 8 << 20  # bytes of entries that are on their way, to or from this rank
LEADER = 0
# (positions before, units, their size) -> units of each rank; None: not worth it
Choose = Callable[[int, int, int], Cuts | None]


class Chain(Leading):
    """The leader's end, a `Forward`: long prompts go over the chain, all else runs here."""

    def __init__(self, transport: Transport, choose: Choose) -> None:
        super().__init__(transport)
        self.choose = choose
        self.costs: Costs | None = None  # as measured when the ranks came
        self.cuts: tuple[int, ...] = ()  # tokens of each rank, of the last prompt that was shared

    @torch.inference_mode()
    def __call__(self, model: Transformer, spans: Sequence[Span], kvs: Sequence[KV]) -> list[Out]:
        found: dict[int, Out] = {}
        for i, (span, kv) in enumerate(zip(spans, kvs, strict=True)):
            ends = self._ends(model, span)
            if ends:
                found[i] = self._shared(model, span, kv, ends)
        rest = [i for i in range(len(spans)) if i not in found]
        if rest:
            outs = lazy(model, [spans[i] for i in rest], [kvs[i] for i in rest])
            found.update(zip(rest, outs, strict=True))
        return [found[i] for i in range(len(spans))]

    def _ends(self, model: Transformer, span: Span) -> list[int]:
        """Where each rank's part of a span ends; nothing where this rank runs all of it."""
        world, chunk = self._transport.world, model.chunk
        stop, first = span.start + len(span.tokens), span.start // chunk
        units = -(-stop // chunk) - first
        alone = span.is_narrow or span.is_lazy or span.width is not None
        alone = alone or (span.adapter is not None and span.adapter not in self.adapters)
        if alone or world == 1 or units < world:
            return []
        cuts = self.choose(first * chunk, units, chunk)
        if cuts is None:
            return []
        ends = [(first + n) * chunk for n in accumulate(cuts)]
        ends[-1] = stop
        return ends if span.want <= stop - ends[-2] else []

    def _shared(self, model: Transformer, span: Span, kv: KV, ends: Sequence[int]) -> Out:
        self.check()
        transport, begin = self._transport, ends[-2]
        starts = [span.start, *ends]
        kv.truncate(span.start)
        with self.together():
            try:
                for rank in range(1, transport.world):
                    place = slice(starts[rank - 1] - span.start, starts[rank] - span.start)
                    adapter = numbered(span, self.adapters)
                    told = [span.start, starts[rank - 1], adapter, *span.tokens[place]]
                    words.send(transport, [rank], told)
                words.send_entries(transport, [1], kv, range(span.start))
                coming = transport.world - 1, range(span.start, begin)
                model.relay = Link(transport, model, kv, coming)
                rest = replace(span, start=begin, tokens=span.tokens[begin - span.start :])
                (out,) = full(model, [rest], [kv])
            finally:
                model.relay = None
        self.cuts = tuple(b - a for a, b in zip(starts, ends, strict=False))
        return out


def follow(model: Transformer, transport: Transport, adapters: Sequence[Adapter] = ()) -> None:
    """Tell how fast this rank is, then compute its parts of the leader's prompts until that ends. Raises
    PeerError."""
    rank, world = transport.rank, transport.world
    chain_costs.tell(model, transport)
    while (told := words.receive(transport, LEADER))[0] != words.END:
        (start, begin, adapter), tokens = told[:3], told[3:].tolist()
        end = begin + len(tokens)
        kv, coming = model.new_kv(end), None
        if rank == 1:
            words.receive_entries(transport, LEADER, kv, range(start))
        else:
            coming = rank - 1, range(begin)
        after = (rank + 1) % world
        going = after, range(start if after == LEADER else 0, end)
        model.relay = Link(transport, model, kv, coming, going)
        with model.threads.narrow(False):
            own = adapters[adapter - 1] if adapter else None
            hidden(model, [(Span(begin, tokens, 0, adapter=own), kv)])
        model.relay = None
    words.ended(transport, LEADER)


Flow = tuple[int, range]  # a rank, and the positions whose entries come from it, or go to it


class Link:
    """A rank's place in a chain, for one prompt (a model's `Stages`): before a layer's attention the entries
    of earlier tokens come in, after it they go on, with this rank's own."""

    begins = True

    def __init__(
        self,
        transport: Transport,
        model: Transformer,
        kv: KV,
        coming: Flow | None,
        going: Flow | None = None,
    ) -> None:
        self._transport, self._model, self._kv = transport, model, kv
        self._coming, self._going = coming, going
        layers, num_heads, _, width = kv.like.shape
        self._each = num_heads * width * kv.like.element_size()  # bytes a position
        self._in, self._out = Line(), Line()
        self._arriving = deque[tuple[Future[Tensor], Tensor]]()
        self._asked = deque(
            (layer, piece)
            for layer in range(layers if coming is not None else 0)
            for piece in pieces(coming[1] if coming is not None else range(0))
        )
        self._sending = deque[tuple[Future[Tensor], int]]()

    def run(self, layers: Sequence[PagedLayer], chunks: Sequence[Chunk], _wanted: Wanted) -> None:
        """All chunks through all layers. Changes their h_TD. Raises PeerError."""
        try:
            for number, layer in enumerate(layers):
                if number % 2 == 0:
                    self._arrive(number // 2)
                layer(chunks)
                if number % 2 == 0:
                    self._hand_on(number // 2)
                self._model.memory.trim()
            while self._sending:
                self._sending.popleft()[0].result()
        finally:
            self._in.close()
            self._out.close()

    def _arrive(self, layer: int) -> None:
        """What has come of a layer, into the cache; more is asked for meanwhile."""
        for _ in pieces(self._coming[1]) if self._coming is not None else ():
            self._ask()
            came, _ = self._arriving.popleft()
            self._kv.append_entries(layer, came.result())
        self._ask()

    def _ask(self) -> None:
        """Receive what comes next, as far as there is room."""
        assert self._coming is not None or not self._asked
        under_way = sum(block.nbytes for _, block in self._arriving)
        while self._asked and (not self._arriving or under_way < WINDOW):
            _, piece = self._asked.popleft()
            _, num_heads, _, width = self._kv.like.shape
            block = self._kv.like.new_empty(num_heads, len(piece), width)
            under_way += block.nbytes
            self._arriving.append((self._in.run(self._receiving(block)), block))

    def _receiving(self, block: Tensor) -> Callable[[], Tensor]:
        assert self._coming is not None
        transport, of = self._transport, self._coming[0]

        def receive() -> Tensor:
            transport.receive(of, as_bytes(block))
            return block

        return receive

    def _hand_on(self, layer: int) -> None:
        for piece in pieces(self._going[1]) if self._going is not None else ():
            entries = self._kv.entries(layer)[:, piece.start : piece.stop]
            block = entries.clone(memory_format=torch.contiguous_format)
            self._sending.append((self._out.run(self._giving(block)), block.nbytes))
            while sum(size for _, size in self._sending) > max(WINDOW, block.nbytes):
                self._sending.popleft()[0].result()

    def _giving(self, block: Tensor) -> Callable[[], Tensor]:
        assert self._going is not None
        transport, to = self._transport, self._going[0]

        def send() -> Tensor:
            transport.send(to, as_bytes(block)).wait()
            return block

        return send


def pieces(positions: range) -> Sequence[range]:
    """PIECE positions at a time."""
    ends = positions.stop
    return [range(at, min(at + PIECE, ends)) for at in range(positions.start, ends, PIECE)]
