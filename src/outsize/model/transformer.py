"""One decoder-only transformer, built from a description and its weights.

Its forward is a loop over blocks, written outside (`forward/`). The residual stream h_TD is fp32 and
is changed in place.
Shapes: T tokens, D model width, H query heads, J key heads, E numbers a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from outsize.cache.kv import KV
from outsize.encoding.group import Group
from outsize.family.description import Description, Rope
from outsize.model.adapter import Adapter
from outsize.model.ffn.experts import Mixture, Router
from outsize.model.halves import Runs, attention_half, ffn_half, mixture_half, vector
from outsize.model.layers import RMSNorm, turns
from outsize.model.step import Segment, Step
from outsize.native.kernels import Kernels
from outsize.weights import budget
from outsize.weights.load import Loaded, Source
from outsize.weights.table import Weights

REFINED = 64
SLACK = 4 << 20  # over what cannot be returned, before returning is tried again


class Part:
    """A half whose weights are held in memory, and then built once, or fetched at each use."""

    def __init__(self, make: Callable[[Weights], Runs], source: Source) -> None:
        self._make, self.source = make, source
        self._half = None if source.pinned is None else make(source.pinned)
        self._built: dict[int, tuple[Weights, Runs]] = {}

    @property
    def is_held(self) -> bool:
        return self._half is not None

    def __call__(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        """Run all chunks, in order. Changes their tensors."""
        if self._half is not None:
            self._half.run(chunks)
            return
        with self.source as weights:
            self._in_slot(weights).run(chunks)

    @property
    def held(self) -> Runs | None:
        """What was built once, if its weights are held."""
        return self._half

    def _in_slot(self, weights: Weights) -> Runs:
        """The half built over a slot's views. The same record in the same slot needs no new one."""
        found = self._built.get(id(weights))
        if found is None:
            found = self._built[id(weights)] = weights, self._make(weights)
        return found[1]

    def unpin(self) -> int:
        """Fetch the weights from now on; the bytes this frees."""
        self._half = None
        return self.source.unpin()


def _link(parts: Sequence[Part]) -> None:
    """Each layer of experts may ask the next one's router, where that is in memory."""

    def router(part: Part) -> Router | None:
        return part.held.router if isinstance(part.held, Mixture) else None

    for i, part in enumerate(parts):
        if isinstance(part.held, Mixture):
            part.held.ahead = partial(router, parts[(i + 1) % len(parts)])


class Transformer:
    """Embedding, blocks, head. Holds no sequence's state."""

    def __init__(
        self,
        description: Description,
        loaded: Loaded,
        kernels: Kernels | None = None,
        ceiling: int | None = None,
    ) -> None:
        """`ceiling`: bytes that the process should not exceed, if returning free memory helps."""
        self.description, self.loaded, self._ceiling = description, loaded, ceiling
        self._embed, self._head = loaded.embed, loaded.head
        self.dtype = loaded.activation_type
        self.parts: list[Part] = []
        for i, (attn, ffn) in enumerate(loaded.layers):
            self.parts.append(Part(partial(attention_half, description, i), attn))
            bank = loaded.banks[i] if loaded.banks else None
            make = (
                partial(ffn_half, description, i)
                if bank is None
                else partial(mixture_half, description, bank)
            )
            self.parts.append(Part(make, ffn))
        _link(self.parts[1::2])
        norm = vector(loaded.final_norm["final_norm"])
        self._norm = RMSNorm(norm, description.norm_eps, torch.float32)
        self._ropes = description.ropes
        self.kernels = kernels if self.dtype == torch.bfloat16 else None
        self._num_held = self._count_held()
        self._lends, self._is_lent = any(cache.lends for cache in loaded.caches), False

    def _count_held(self) -> int:
        return sum(part.is_held for part in self.parts)

    def end_pass(self) -> None:
        """Parts held in memory are hits that nobody else sees; experts' policies count passes."""
        self.loaded.traffic.hits += self._num_held
        for cache in {bank.cache for bank in self.loaded.banks}:
            cache.ledger.begin_pass()

    def shrink(self, size: int) -> int:
        """Give up what was lent, then held layers, the last ones first, until `size` bytes are free; the
        bytes of held ones."""
        lent, self._lends = self._give_back(), False
        size, freed = size - lent, 0
        for part in reversed(self.parts):
            if freed >= size:
                break
            freed += part.unpin() if part.is_held else 0
        self._num_held = self._count_held()
        return freed

    def begin(self, is_large: bool) -> None:
        """A step begins: a long span, or a batch, needs the scratch, which is else lent to slots."""
        if is_large:
            self._give_back()
            self._is_lent = False
        elif self._lends and not self._is_lent:
            budget.trim()
            for cache in self.loaded.caches:
                cache.borrow()
            self._is_lent = True

    def _give_back(self) -> int:
        return sum(cache.give_back() for cache in self.loaded.caches)

    def tidy(self) -> None:
        """Return free memory that the allocator keeps, if there is more of it than was planned: in some
        runs a long span's large blocks never fit the holes of earlier ones, and leave new holes."""
        if self._ceiling is not None and budget.resident() > self._ceiling:
            budget.trim()
            self._ceiling = max(self._ceiling, budget.resident() + SLACK)

    @property
    def waited_s(self) -> float:
        """Seconds that computing has stood still for reads so far."""
        return self.loaded.traffic.waited_s + self.loaded.expert_traffic.waited_s

    def new_kv(self, room: int = 0) -> KV:
        """An empty cache for one sequence; with `room` for so many tokens it never moves."""
        d = self.description
        return KV(d.num_layers, d.num_kv_heads, d.head_dim, self.dtype, room)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """(T, D) fp32."""
        rows = self._embed.rows(torch.tensor(tokens, dtype=torch.int64, device="cpu"))
        scale = self.description.embed_scale
        return rows if scale == 1.0 else rows.mul_(scale)

    def step(
        self, segments: Sequence[Segment], wide: bool, added: Sequence[tuple[slice, Adapter]] = ()
    ) -> Step:
        """The positions of a step, turned into rotations once for all layers."""
        positions = [p for s in segments for p in s.all_positions()]
        made = rotations(self._ropes, self.description.head_dim, positions)
        return Step(segments, made, wide, None if wide else self.kernels, added)

    def normed(self, h_TD: Tensor) -> Tensor:
        """What the head reads."""
        return self._norm(h_TD)

    def logits(self, h_KD: Tensor) -> Tensor:
        """(K, V) fp32 of the residual stream."""
        return self.project(self._norm(h_KD))

    def head_rows(self, ids: Tensor) -> Tensor:
        """(T, D) fp32: what some tokens' logits are products with."""
        return self._head.rows(ids)

    def project(self, x_KD: Tensor) -> Tensor:
        """(K, V) fp32 of normed states. Kernels of int4 and int8 give bf16, whose steps near 20 are 0.125,
        more than often lies between the two best tokens; there each row's best are computed again in fp32."""
        exact = isinstance(self._head.encoding, Group) or self.dtype == torch.float32
        logits = self._project(x_KD if exact else x_KD.to(self.dtype), torch.float32)
        if not exact:
            for row, x_D in zip(logits, x_KD, strict=True):
                ids = _best(row)
                row[ids] = self._head.rows(ids) @ x_D
        return logits

    def likely(self, x_KD: Tensor, count: int) -> Tensor:
        """(K, C) ids of the likeliest tokens after normed states, roughly: in the type of activations."""
        logits = self._project(x_KD.to(self.dtype), self.dtype)
        return logits.topk(min(count, logits.shape[1])).indices

    def _project(self, x_KD: Tensor, dtype: torch.dtype) -> Tensor:
        """(K, V), block by block into one place."""
        size, at = self.description.vocab_size, 0
        out_KV = torch.empty(len(x_KD), size, dtype=dtype, device="cpu")
        for w in self._head.blocks():
            count = min(w.num_rows, size - at)
            out_KV[:, at : at + count] = w.encoding.linear(x_KD, w.fields, False)[:, :count]
            at += count
        return out_KV


def rotations(ropes: Sequence[Rope], head_dim: int, positions: Sequence[int]) -> dict[Rope, Tensor]:
    """How far each position turns, for each kind of rope."""
    positions_T = torch.tensor(positions, dtype=torch.int64, device="cpu")
    return {rope: turns(rope, head_dim, positions_T) for rope in ropes}


def _best(row_V: Tensor) -> Tensor:
    """Ids of the REFINED largest logits: the best blocks first, then the best in those."""
    whole = len(row_V) // REFINED * REFINED
    blocks = row_V[:whole].view(-1, REFINED)
    if len(blocks) <= REFINED:
        return row_V.topk(min(REFINED, len(row_V))).indices
    chosen = blocks.amax(1).topk(REFINED).indices
    best = blocks[chosen].flatten().topk(REFINED).indices
    return chosen[best // REFINED] * REFINED + best % REFINED
