"""The halves of a layer: attention, and one kind of feed-forward or another.

Shapes: T tokens, S stored, D model width, H query heads, J key heads, E numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from outsize.kernels.native import AttentionSpec, Kernels
from outsize.model.attention import attend_rows, attend_span
from outsize.model.ffn.dense import Dense
from outsize.model.ffn.experts import Mixture
from outsize.model.layers import Linear, RMSNorm, rotate
from outsize.model.step import Segment, Step, gather
from outsize.model_config import Description, Layer
from outsize.storage.table import Weight, Weights, activation_type
from outsize.weights.experts import ExpertBank


class Attention:
    """Fused query, key and value; norms and rotation; the cache; the output map."""

    def __init__(self, d: Description, layer: Layer, index: int, w: Weights) -> None:
        self.index, self.layer, self.scale = index, layer, d.attn_scale
        self.dtype, self.num_heads = activation_type(w["qkv"]), d.num_heads
        self.num_rotated, self.head_dim = d.num_heads + d.num_kv_heads, d.head_dim
        self.qkv, self.o = Linear(w["qkv"]), Linear(w["o"])
        self.bias = vector(w["qkv_bias"]) if d.qkv_bias else None
        self.o_bias = vector(w["o_bias"]) if d.o_bias else None
        self.sinks = vector(w["sinks"]) if d.sinks else None
        self.norm: RMSNorm | None = None
        if d.qk_norm:
            q = vector(w["q_norm"]).expand(d.num_heads, -1)
            k = vector(w["k_norm"]).expand(d.num_kv_heads, -1)
            self.norm = RMSNorm(torch.cat([q, k]), d.norm_eps, torch.float32)
        self.whole = _whole_norms(d, w)
        norm = None if self.norm is None else self.norm.weight
        heads = (d.num_heads, d.num_kv_heads, d.head_dim)
        self.spec = AttentionSpec(
            heads, layer.window, self.scale, d.norm_eps, self.bias, norm, self.sinks
        )

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        inner = self._attended(x_TD, step)
        out = step.add(self.index, "o", inner, self.o(inner, step.wide))
        return out if self.o_bias is None else (out + self.o_bias).to(out.dtype)

    def _attended(self, x_TD: Tensor, step: Step) -> Tensor:
        qkv = step.add(self.index, "qkv", x_TD, self.qkv(x_TD, step.wide))
        at = 0
        for norm in self.whole:
            part = qkv[:, at : at + norm.weight.shape[-1]]
            part.copy_(norm(part.float()))
            at += part.shape[1]
        if step.kernels is not None:
            return self._native(qkv, step, step.kernels)
        if self.bias is not None:
            qkv = qkv + self.bias  # fp32
        heads = qkv.view(len(qkv), -1, self.head_dim)
        qk = heads[:, : self.num_rotated].float()
        if self.norm is not None:
            qk = self.norm(qk)
        qk = rotate(qk, step.turns[self.layer.rope])
        q_THE, k_TJE = qk[:, : self.num_heads].to(self.dtype), qk[:, self.num_heads :]
        return self._plain(q_THE, k_TJE, heads[:, self.num_rotated :], step)

    def _plain(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor, step: Step) -> Tensor:
        out, at, window = [], 0, self.layer.window
        for s in step.segments:
            rows, end = slice(at, at + len(s.positions)), at + s.length
            kv_CSE = s.kv.append(self.index, k_TJE[rows], v_TJE[rows], s.positions)
            if step.wide:
                seen = s.kv.positions[self.index]
                out.append(attend_span(q_THE[rows], kv_CSE, seen, self.scale, window, self.sinks))
            else:
                out.append(attend_rows(q_THE[rows], kv_CSE, self.scale, window, self.sinks))
            if s.num_masks:
                masks = slice(rows.stop, end)
                out += self._masks(q_THE[masks], k_TJE[masks], v_TJE[masks], kv_CSE, s)
            at = end
        return gather(out)

    def _masks(
        self, q_MHE: Tensor, k_MJE: Tensor, v_MJE: Tensor, kv_CSE: Tensor, s: Segment
    ) -> Iterator[Tensor]:
        """Each mask over what it sees: its anchor's past, then its own block so far."""
        own_CME = torch.cat([k_MJE, v_MJE], dim=1).transpose(0, 1).to(kv_CSE.dtype)
        size, count = kv_CSE.shape[1], len(s.positions)
        for row, reach in enumerate(s.reaches(size - count, self.layer.window)[count:]):
            own = own_CME[:, reach.start - size : reach.slot + 1 - size]
            seen_CSE = torch.cat([kv_CSE[:, reach.first : reach.seen], own], dim=1)
            yield attend_rows(q_MHE[row : row + 1], seen_CSE, self.scale, None, self.sinks)

    def _native(self, qkv: Tensor, step: Step, kernels: Kernels) -> Tensor:
        rows, turns_TE = step.table(self.index, self.layer.window), step.turns[self.layer.rope]
        return kernels.attend(self.spec, qkv.contiguous(), turns_TE, rows)


def _whole_norms(d: Description, w: Weights) -> tuple[RMSNorm, ...]:
    """Norms of all query heads as one vector, and of all key heads."""
    if not d.qk_norm_whole:
        return ()
    made = (RMSNorm(vector(w[k]), d.norm_eps, torch.float32) for k in ("q_norm", "k_norm"))
    return tuple(made)


class Runnable(Protocol):
    """Half a layer."""

    def run(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        """Run all chunks, in order. Changes their tensors."""
        ...


class SubLayer:
    """h += body(norm(h)): half a layer; some families norm the result, too."""

    def __init__(
        self, norm: RMSNorm, body: Callable[[Tensor, Step], Tensor], post: RMSNorm | None
    ) -> None:
        self._norm, self._body, self._post = norm, body, post

    def __call__(self, h_TD: Tensor, step: Step) -> None:
        """Changes h_TD."""
        _add(h_TD, self._body(_normed(self._norm, h_TD, step), step), self._post, step)

    def run(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        for h_TD, step in chunks:
            self(h_TD, step)


def attention_sublayer(d: Description, index: int, w: Weights) -> SubLayer:
    norm = RMSNorm(vector(w["attn_norm"]), d.norm_eps, activation_type(w["qkv"]))
    return SubLayer(norm, Attention(d, d.layers[index], index, w), _post(d, w, "attn_post_norm"))


def ffn_sublayer(d: Description, index: int, w: Weights) -> SubLayer:
    norm = RMSNorm(vector(w["ffn_norm"]), d.norm_eps, activation_type(w["gate_up"]))
    biases = (vector(w["gate_up_bias"]), vector(w["down_bias"])) if d.mlp_bias else None
    dense = Dense(Linear(w["gate_up"]), Linear(w["down"]), d.activation, index, biases)
    return SubLayer(norm, dense, _post(d, w, "ffn_post_norm"))


def mixture_sublayer(d: Description, bank: ExpertBank, w: Weights) -> Mixture:
    norm = RMSNorm(vector(w["ffn_norm"]), d.norm_eps, bank.activation_type)
    (router,) = w["router"]
    bias = vector(w["router_bias"]) if "router_bias" in w else None
    return Mixture(d, norm, router.encoding.decode(router.fields), bank, bias)


def _post(d: Description, w: Weights, name: str) -> RMSNorm | None:
    return RMSNorm(vector(w[name]), d.norm_eps, torch.float32) if d.post_norm else None


def _normed(norm: RMSNorm, h_TD: Tensor, step: Step) -> Tensor:
    return norm(h_TD) if step.kernels is None else step.kernels.norm(h_TD, norm.weight, norm.eps)


def _add(h_TD: Tensor, y_TD: Tensor, norm: RMSNorm | None, step: Step) -> None:
    """h += y, normed where the family does that. Changes h_TD."""
    if step.kernels is not None:
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        step.kernels.residual(h_TD, y_TD.contiguous(), weight, eps)
    else:
        h_TD.add_(y_TD if norm is None else norm(y_TD.float()))


def vector(weights: tuple[Weight, ...]) -> Tensor:
    """A stored fp32 vector, whole."""
    return torch.cat([w.encoding.decode(w.fields)[0] for w in weights])
