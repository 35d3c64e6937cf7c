"""The sub-layers of a layer: attention, and a feed-forward (dense, or a mixture of experts).

Shapes: T rows, D model width, H query heads, J key heads, E numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from outsize.kernels.backend import AttentionSpec
from outsize.kernels.norm import RMSNorm
from outsize.model.ffn.dense import Dense
from outsize.model.ffn.experts import Mixture
from outsize.model.layers import Linear
from outsize.model.step import Step
from outsize.model_config import Description
from outsize.storage.table import Weight, Weights, activation_type
from outsize.weights.experts import ExpertBank


class Runnable(Protocol):
    """Half a layer over weights in memory."""

    def run(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        """Run all chunks of rows, in order. Changes their residual streams (T, D)."""
        ...


class SubLayer:
    """h += post(body(norm(h)) + bias), in place; few families have the norm after the body, or the bias."""

    def __init__(
        self,
        norm: RMSNorm,
        body: Callable[[Tensor, Step], Tensor],
        post: RMSNorm | None = None,
        bias_D: Tensor | None = None,
    ) -> None:
        self._norm, self._body, self._post, self._bias_D = norm, body, post, bias_D

    def __call__(self, h_TD: Tensor, step: Step) -> None:
        y_TD = self._body(step.backend.norm(h_TD, self._norm), step)
        step.residual(h_TD, y_TD, self._post, self._bias_D)

    def run(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        for h_TD, step in chunks:
            self(h_TD, step)


class Attention:
    """o(attend(qkv(x))): query, key and value as one linear map, attention over the cache, the output map."""

    def __init__(self, d: Description, index: int, w: Weights) -> None:
        self._index, self._rope = index, d.layers[index].rope
        self._qkv, self._o = Linear(w["qkv"]), Linear(w["o"])
        self._whole_norms = _whole_norms(d, w)
        self._spec = AttentionSpec(
            layer=index,
            num_heads=d.num_heads,
            num_kv_heads=d.num_kv_heads,
            head_dim=d.head_dim,
            scale=d.attn_scale,
            window=d.layers[index].window,
            bias=vector(w["qkv_bias"]) if d.qkv_bias else None,
            norm=_head_norms(d, w) if d.qk_norm else None,
            sinks=vector(w["sinks"]) if d.sinks else None,
        )

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        qkv = step.add(self._index, "qkv", x_TD, self._qkv(x_TD, step.wide))
        at = 0
        for norm in self._whole_norms:
            some = qkv[:, at : at + norm.weight.shape[-1]]
            some.copy_(norm(some.float()))
            at += some.shape[1]
        cos_sin = step.cos_sin[self._rope]
        watched = [(w, qkv[w.rows].clone()) for w in step.watches if w.is_for(self._index)]
        inner = step.backend.attend(self._spec, qkv, cos_sin, step.rows)
        for watch, rows in watched:
            watch.see(self._spec, rows, cos_sin[watch.rows])
        return step.add(self._index, "o", inner, self._o(inner, step.wide))


def _head_norms(d: Description, w: Weights) -> RMSNorm:
    """Of each query and key head apart (H + J, E)."""
    q = vector(w["q_norm"]).expand(d.num_heads, -1)
    k = vector(w["k_norm"]).expand(d.num_kv_heads, -1)
    return RMSNorm(torch.cat([q, k]), d.norm_eps, torch.float32)


def _whole_norms(d: Description, w: Weights) -> tuple[RMSNorm, ...]:
    """Norms of all query heads as one vector, and of all key heads."""
    if not d.qk_norm_whole:
        return ()
    made = (RMSNorm(vector(w[k]), d.norm_eps, torch.float32) for k in ("q_norm", "k_norm"))
    return tuple(made)


def attention_sublayer(d: Description, index: int, w: Weights) -> SubLayer:
    norm = RMSNorm(vector(w["attn_norm"]), d.norm_eps, activation_type(w["qkv"]))
    bias_D = vector(w["o_bias"]) if d.o_bias else None
    return SubLayer(norm, Attention(d, index, w), _post(d, w, "attn_post_norm"), bias_D)


def ffn_sublayer(d: Description, index: int, w: Weights) -> SubLayer:
    norm = RMSNorm(vector(w["ffn_norm"]), d.norm_eps, activation_type(w["gate_up"]))
    inner_bias, bias_D = (
        (vector(w["gate_up_bias"]), vector(w["down_bias"])) if d.mlp_bias else (None, None)
    )
    dense = Dense(Linear(w["gate_up"]), Linear(w["down"]), d.activation, index, inner_bias)
    return SubLayer(norm, dense, _post(d, w, "ffn_post_norm"), bias_D)


def mixture_sublayer(d: Description, bank: ExpertBank, w: Weights) -> Mixture:
    norm = RMSNorm(vector(w["ffn_norm"]), d.norm_eps, bank.activation_type)
    (router,) = w["router"]
    bias = vector(w["router_bias"]) if "router_bias" in w else None
    return Mixture(d, norm, router.encoding.decode(router.fields), bank, bias)


def _post(d: Description, w: Weights, name: str) -> RMSNorm | None:
    return RMSNorm(vector(w[name]), d.norm_eps, torch.float32) if d.post_norm else None


def vector(weights: tuple[Weight, ...]) -> Tensor:
    """A stored fp32 vector, whole."""
    return torch.cat([w.encoding.decode(w.fields)[0] for w in weights])
