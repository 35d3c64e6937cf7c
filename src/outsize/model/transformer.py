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
from outsize.family.description import Description, Layer, Rope
from outsize.model.attention import attend_rows, attend_span
from outsize.model.ffn.dense import Dense
from outsize.model.layers import Linear, RMSNorm, rotate, turns
from outsize.model.step import Segment, Step
from outsize.native.kernels import AttentionSpec, Kernels
from outsize.weights import budget
from outsize.weights.load import Loaded, Source, activation_type
from outsize.weights.table import Weight, Weights

REFINED = 64
SLACK = 4 << 20  # over what cannot be returned, before returning is tried again


class Attention:
    """Fused query, key and value; norms and rotation; the cache; the output map."""

    def __init__(self, d: Description, layer: Layer, index: int, w: Weights) -> None:
        self.index, self.layer, self.scale = index, layer, d.attn_scale
        self.dtype, self.num_heads = activation_type(w["qkv"]), d.num_heads
        self.num_rotated, self.head_dim = d.num_heads + d.num_kv_heads, d.head_dim
        self.qkv, self.o = Linear(w["qkv"]), Linear(w["o"])
        self.bias = vector(w["qkv_bias"]) if d.qkv_bias else None
        self.norm: RMSNorm | None = None
        if d.qk_norm:
            q = vector(w["q_norm"]).expand(d.num_heads, -1)
            k = vector(w["k_norm"]).expand(d.num_kv_heads, -1)
            self.norm = RMSNorm(torch.cat([q, k]), d.norm_eps, torch.float32)
        norm = None if self.norm is None else self.norm.weight
        heads = (d.num_heads, d.num_kv_heads, d.head_dim)
        self.spec = AttentionSpec(heads, layer.window, self.scale, d.norm_eps, self.bias, norm)

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        qkv = self.qkv(x_TD, step.wide)
        if step.kernels is not None:
            return self.o(self._native(qkv, step, step.kernels), step.wide)
        if self.bias is not None:
            qkv = qkv + self.bias  # fp32
        heads = qkv.view(len(qkv), -1, self.head_dim)
        qk = heads[:, : self.num_rotated].float()
        if self.norm is not None:
            qk = self.norm(qk)
        qk = rotate(qk, step.turns[self.layer.rope])
        q_THE, k_TJE = qk[:, : self.num_heads].to(self.dtype), qk[:, self.num_heads :]
        return self.o(self._plain(q_THE, k_TJE, heads[:, self.num_rotated :], step), step.wide)

    def _plain(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor, step: Step) -> Tensor:
        out, at, window = [], 0, self.layer.window
        for s in step.segments:
            rows = slice(at, at + s.length)
            kv_CSE = s.kv.append(self.index, k_TJE[rows], v_TJE[rows], s.positions)
            if step.wide:
                seen = s.kv.positions[self.index]
                out.append(attend_span(q_THE[rows], kv_CSE, seen, self.scale, window))
            else:
                out.append(attend_rows(q_THE[rows], kv_CSE, self.scale, window))
            at += s.length
        return out[0] if len(out) == 1 else torch.cat(out)

    def _native(self, qkv: Tensor, step: Step, kernels: Kernels) -> Tensor:
        rows: list[tuple[Tensor, int]] = []
        for s in step.segments:
            stored, first = s.kv.reserve(self.index, s.positions)
            rows += [(stored, first + i) for i in range(s.length)]
        turns_TE = step.turns[self.layer.rope]
        return kernels.attend(self.spec, qkv.contiguous(), turns_TE, rows)


class Half:
    """h += body(norm(h)): half a layer; some families norm the result, too."""

    def __init__(
        self, norm: RMSNorm, body: Callable[[Tensor, Step], Tensor], post: RMSNorm | None
    ) -> None:
        self._norm, self._body, self._post = norm, body, post

    def __call__(self, h_TD: Tensor, step: Step) -> None:
        """Changes h_TD."""
        _add(h_TD, self._body(_normed(self._norm, h_TD, step), step), self._post, step)


def attention_half(d: Description, index: int, w: Weights) -> Half:
    norm = RMSNorm(vector(w["attn_norm"]), d.norm_eps, activation_type(w["qkv"]))
    return Half(norm, Attention(d, d.layers[index], index, w), _post(d, w, "attn_post_norm"))


def ffn_half(d: Description, index: int, w: Weights) -> Half:
    norm = RMSNorm(vector(w["ffn_norm"]), d.norm_eps, activation_type(w["gate_up"]))
    dense = Dense(Linear(w["gate_up"]), Linear(w["down"]), d.activation)
    return Half(norm, dense, _post(d, w, "ffn_post_norm"))


def _post(d: Description, w: Weights, name: str) -> RMSNorm | None:
    return RMSNorm(vector(w[name]), d.norm_eps, torch.float32) if d.post_norm else None


class Part:
    """A half whose weights are held in memory, and then built once, or fetched at each use."""

    def __init__(self, make: Callable[[Weights], Half], source: Source) -> None:
        self._make, self.source = make, source
        self._half = None if source.pinned is None else make(source.pinned)
        self._built: dict[int, tuple[Weights, Half]] = {}

    @property
    def is_held(self) -> bool:
        return self._half is not None

    def __call__(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        """Run all chunks, in order. Changes their tensors."""
        half = self._half
        if half is not None:
            for h_TD, step in chunks:
                half(h_TD, step)
            return
        with self.source as weights:
            half = self._in_slot(weights)
            for h_TD, step in chunks:
                half(h_TD, step)

    def _in_slot(self, weights: Weights) -> Half:
        """The half built over a slot's views. The same record in the same slot needs no new one."""
        found = self._built.get(id(weights))
        if found is None:
            found = self._built[id(weights)] = weights, self._make(weights)
        return found[1]

    def unpin(self) -> int:
        """Fetch the weights from now on; the bytes this frees."""
        self._half = None
        return self.source.unpin()


def _normed(norm: RMSNorm, h_TD: Tensor, step: Step) -> Tensor:
    return norm(h_TD) if step.kernels is None else step.kernels.norm(h_TD, norm.weight, norm.eps)


def _add(h_TD: Tensor, y_TD: Tensor, norm: RMSNorm | None, step: Step) -> None:
    """h += y, normed where the family does that. Changes h_TD."""
    if step.kernels is not None:
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        step.kernels.residual(h_TD, y_TD.contiguous(), weight, eps)
    else:
        h_TD.add_(y_TD if norm is None else norm(y_TD.float()))


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
            self.parts.append(Part(partial(ffn_half, description, i), ffn))
        norm = vector(loaded.final_norm["final_norm"])
        self._norm = RMSNorm(norm, description.norm_eps, torch.float32)
        self._ropes = description.ropes
        self._kernels = kernels if self.dtype == torch.bfloat16 else None
        self._num_held = self._count_held()

    def _count_held(self) -> int:
        return sum(part.is_held for part in self.parts)

    def count_pass(self) -> None:
        """Parts held in memory are hits that nobody else sees."""
        self.loaded.traffic.hits += self._num_held

    def shrink(self, size: int) -> int:
        """Give up held layers, the last ones first, until `size` bytes are free; the bytes freed."""
        freed = 0
        for part in reversed(self.parts):
            if freed >= size:
                break
            freed += part.unpin() if part.is_held else 0
        self._num_held = self._count_held()
        return freed

    def tidy(self) -> None:
        """Return free memory that the allocator keeps, if there is more of it than was planned: in some
        runs a long span's large blocks never fit the holes of earlier ones, and leave new holes."""
        if self._ceiling is not None and budget.resident() > self._ceiling:
            budget.trim()
            self._ceiling = max(self._ceiling, budget.resident() + SLACK)

    @property
    def has_kernels(self) -> bool:
        """Are the compiled row kernels in use?"""
        return self._kernels is not None

    def new_kv(self, room: int = 0) -> KV:
        """An empty cache for one sequence; with `room` for so many tokens it never moves."""
        d = self.description
        return KV(d.num_layers, d.num_kv_heads, d.head_dim, self.dtype, room)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """(T, D) fp32."""
        rows = self._embed.rows(torch.tensor(tokens))
        scale = self.description.embed_scale
        return rows if scale == 1.0 else rows.mul_(scale)

    def step(self, segments: Sequence[Segment], wide: bool) -> Step:
        """The positions of a step, turned into rotations once for all layers."""
        positions = [p for s in segments for p in s.positions]
        made = rotations(self._ropes, self.description.head_dim, positions)
        return Step(segments, made, wide, None if wide else self._kernels)

    def logits(self, h_KD: Tensor) -> Tensor:
        """(K, V) fp32. Kernels of int4 and int8 give bf16, whose steps near 20 are 0.125, more than
        often lies between the two best tokens; there each row's best are computed again in fp32."""
        x_KD, vocab = self._norm(h_KD), self.description.vocab_size
        exact = isinstance(self._head.encoding, Group) or self.dtype == torch.float32
        x = x_KD if exact else x_KD.to(self.dtype)
        blocks = self._head.blocks()
        parts = [w.encoding.linear(x, w.fields, False)[:, : w.num_rows] for w in blocks]
        logits = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[:, :vocab].float()
        if not exact:
            for row, x_D in zip(logits, x_KD, strict=True):
                ids = _best(row)
                row[ids] = self._head.rows(ids) @ x_D
        return logits


def rotations(ropes: Sequence[Rope], head_dim: int, positions: Sequence[int]) -> dict[Rope, Tensor]:
    """How far each position turns, for each kind of rope."""
    positions_T = torch.tensor(positions)
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


def vector(weights: tuple[Weight, ...]) -> Tensor:
    """A stored fp32 vector, whole."""
    return torch.cat([w.encoding.decode(w.fields)[0] for w in weights])
