"""One decoder-only transformer, built from a description and its weights.

Its forward is a loop over blocks, written outside (`forward/`). The residual stream h_TD is fp32 and
is changed in place.
Shapes: T tokens, D model width, H query heads, J key heads, E numbers a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outsize.cache.kv import KV
from outsize.encoding.group import Group
from outsize.family.description import Description, Layer, Rope
from outsize.model.attention import attend_rows, attend_span
from outsize.model.ffn.dense import Dense
from outsize.model.layers import Linear, RMSNorm, rotate, turns
from outsize.native.kernels import AttentionSpec, Kernels
from outsize.weights.table import Weight, Weights

REFINED = 64


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one sequence in a step."""

    kv: KV
    positions: range

    @property
    def length(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class Step:
    """What the blocks need to know of a step: whose rows, at which positions, how wide."""

    segments: Sequence[Segment]
    turns: Mapping[Rope, Tensor]
    wide: bool
    kernels: Kernels | None  # None: the plain path


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


class Block:
    """h += attention(norm(h)); h += ffn(norm(h)); some families norm the results, too."""

    def __init__(self, d: Description, index: int, attn: Weights, ffn: Weights) -> None:
        dtype = activation_type(attn["qkv"])
        self.attn_norm = RMSNorm(vector(attn["attn_norm"]), d.norm_eps, dtype)
        self.ffn_norm = RMSNorm(vector(ffn["ffn_norm"]), d.norm_eps, dtype)
        self.attention = Attention(d, d.layers[index], index, attn)
        self.ffn = Dense(Linear(ffn["gate_up"]), Linear(ffn["down"]), d.activation)
        self.attn_post = self.ffn_post = None
        if d.post_norm:
            norms = vector(attn["attn_post_norm"]), vector(ffn["ffn_post_norm"])
            self.attn_post, self.ffn_post = (RMSNorm(n, d.norm_eps, torch.float32) for n in norms)

    def __call__(self, h_TD: Tensor, step: Step) -> None:
        """Changes h_TD."""
        y = self.attention(_normed(self.attn_norm, h_TD, step), step)
        _add(h_TD, y, self.attn_post, step)
        y = self.ffn(_normed(self.ffn_norm, h_TD, step), step.wide, step.kernels)
        _add(h_TD, y, self.ffn_post, step)


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
        embed: Weight,
        head: Weight,
        layers: Sequence[tuple[Weights, Weights]],
        final_norm: Weights,
        kernels: Kernels | None = None,
    ) -> None:
        self.description = description
        self._embed, self._head = embed, head
        self.blocks = [Block(description, i, *w) for i, w in enumerate(layers)]
        self.dtype = self.blocks[0].attention.dtype
        norm = vector(final_norm["final_norm"])
        self._norm = RMSNorm(norm, description.norm_eps, torch.float32)
        self._ropes = {layer.rope for layer in description.layers}
        self._kernels = kernels if self.dtype == torch.bfloat16 else None

    @property
    def has_kernels(self) -> bool:
        """Are the compiled row kernels in use?"""
        return self._kernels is not None

    def new_kv(self) -> KV:
        """An empty cache for one sequence."""
        d = self.description
        return KV(d.num_layers, d.num_kv_heads, d.head_dim, self.dtype)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """(T, D) fp32."""
        rows = self._embed.encoding.rows(self._embed.fields, torch.tensor(tokens))
        scale = self.description.embed_scale
        return rows if scale == 1.0 else rows.mul_(scale)

    def step(self, segments: Sequence[Segment], wide: bool) -> Step:
        """The positions of a step, turned into rotations once for all layers."""
        positions_T = torch.tensor([p for s in segments for p in s.positions])
        head_dim = self.description.head_dim
        made = {r: turns(r, head_dim, positions_T) for r in self._ropes}
        return Step(segments, made, wide, None if wide else self._kernels)

    def logits(self, h_KD: Tensor) -> Tensor:
        """(K, V) fp32. Kernels of int4 and int8 give bf16, whose steps near 20 are 0.125, more than
        often lies between the two best tokens; there each row's best are computed again in fp32."""
        head, vocab = self._head, self.description.vocab_size
        x_KD, encoding = self._norm(h_KD), head.encoding
        if isinstance(encoding, Group):
            return encoding.linear(x_KD, head.fields, False)[:, :vocab]
        logits = encoding.linear(x_KD.to(self.dtype), head.fields, False)[:, :vocab].float()
        if self.dtype != torch.float32:
            for row, x_D in zip(logits, x_KD, strict=True):
                ids = _best(row)
                row[ids] = encoding.rows(head.fields, ids) @ x_D
        return logits


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


def activation_type(weights: tuple[Weight, ...]) -> torch.dtype:
    """fp32 packs run in fp32, all others in bf16."""
    return torch.float32 if weights[0].encoding.name == "fp32" else torch.bfloat16
