"""Attention of a layer: its projections, what backends are told of it, its norms.

Shapes: T rows, D model width, H query heads, J key heads, E numbers a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from outsize.kernels.backend import AttentionSpec
from outsize.kernels.norm import RMSNorm
from outsize.model.layers import Linear, apart, query_growth
from outsize.model.step import Step
from outsize.model_config import Description, Rope
from outsize.storage.table import Weight, Weights


class Attention:
    """o(attend(qkv(x))): query, key and value as one linear map, attention over the cache, the output map."""

    def __init__(self, d: Description, index: int, w: Weights) -> None:
        self._index, self._rope, d = index, d.layers[index].rope, d.of_layer(index)
        self._qkv, self._o = Linear(w["qkv"]), Linear(w["o"])
        self._gate = Linear(w["attn_gate"]) if d.gated else None
        self._whole_norms = _whole_norms(d, w)
        self._queries = d.num_heads * d.head_dim
        # A layer that shares keys and values makes none; kernels are handed zeros, which nothing sees.
        self._missing = 0 if d.layers[index].shares is None else 2 * d.num_kv_heads * d.head_dim
        bias = pad(vector(w["qkv_bias"]), (0, self._missing)) if d.qkv_bias else None
        norm = _head_norms(d, w) if d.qk_norm else None
        norm = _unit_norm(d) if d.layers[index].unit_norm else norm
        self._value_norm = _value_norm(d) if d.value_norm and not self._missing else None
        sinks = vector(w["sinks"]) if d.sinks else None
        self._spec = spec_of(d, index, bias, norm, sinks)

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        qkv = step.add(self._index, "qkv", x_TD, self._qkv(x_TD, step.wide))
        at = 0
        for norm in self._whole_norms:
            some = qkv[:, at : at + norm.weight.shape[-1]]
            some.copy_(norm(some.float()))
            at += some.shape[1]
        if self._value_norm is not None:
            norm_values(qkv, self._value_norm)
        if self._rope.query_growth:
            grow_queries(qkv[:, : self._queries], self._rope, step)
        qkv = pad(qkv, (0, self._missing)) if self._missing else qkv
        inner = attend(self._spec, qkv, self._rope, step)
        if self._gate is not None:
            gate = apart(torch.sigmoid, self._gate(x_TD, step.wide).float(), step.wide)
            inner = (inner.float() * gate).to(inner.dtype)
        return step.add(self._index, "o", inner, self._o(inner, step.wide))


def spec_of(
    d: Description,
    index: int,
    bias: Tensor | None = None,
    norm: RMSNorm | None = None,
    sinks: Tensor | None = None,
) -> AttentionSpec:
    """What backends are told of a layer's attention."""
    layer, d = d.layers[index], d.of_layer(index)
    sizes = d.num_heads, d.num_kv_heads, d.head_dim
    tensors, own = (bias, norm, sinks), layer.shares is None
    of = index if layer.shares is None else layer.shares
    return AttentionSpec(
        of, *sizes, d.attn_scale, layer.window, *tensors, d.attn_cap, layer.chunked, own
    )


def attend(spec: AttentionSpec, qkv: Tensor, rope: Rope, step: Step) -> Tensor:
    """Attention over the cache, which those who watch the step see, too."""
    cos_sin = step.cos_sin[rope]
    watched = [(w, qkv[w.rows].clone()) for w in step.watches if w.is_for(spec.layer)]
    inner = step.backend.attend(spec, qkv, cos_sin, step.rows)
    for watch, rows in watched:
        watch.see(spec, rows, cos_sin[watch.rows])
    return inner


def norm_values(qkv: Tensor, norm: RMSNorm) -> None:
    """Each value head normed, in place."""
    v_TJE = qkv[:, -norm.weight.numel() :].unflatten(1, norm.weight.shape)
    v_TJE.copy_(norm(v_TJE.float()))


def grow_queries(q_TN: Tensor, rope: Rope, step: Step) -> None:
    """Queries of far positions grow, in place."""
    growth_T1 = query_growth(rope, step.rows.all_positions())
    if growth_T1 is not None:
        q_TN.copy_(q_TN.float() * growth_T1)


def _head_norms(d: Description, w: Weights) -> RMSNorm:
    """Of each query and key head apart (H + J, E)."""
    q = vector(w["q_norm"]).expand(d.num_heads, -1)
    k = vector(w["k_norm"]) if "k_norm" in w else torch.ones_like(q[0])
    k = k.expand(d.num_kv_heads, -1)
    return RMSNorm(torch.cat([q, k]), d.norm_eps, torch.float32)


def _unit_norm(d: Description) -> RMSNorm:
    """Of each head apart, without weights."""
    shape = d.num_heads + d.num_kv_heads, d.head_dim
    return RMSNorm(torch.ones(shape, dtype=torch.float32, device="cpu"), d.norm_eps, torch.float32)


def _value_norm(d: Description) -> RMSNorm:
    """Of each value head apart, without weights."""
    ones = torch.ones(d.num_kv_heads, d.head_dim, dtype=torch.float32, device="cpu")
    return RMSNorm(ones, d.norm_eps, torch.float32)


def _whole_norms(d: Description, w: Weights) -> tuple[RMSNorm, ...]:
    """Norms of all query heads as one vector, and of all key heads."""
    if not d.qk_norm_whole:
        return ()
    made = (RMSNorm(vector(w[k]), d.norm_eps, torch.float32) for k in ("q_norm", "k_norm"))
    return tuple(made)


def vector(weights: tuple[Weight, ...]) -> Tensor:
    """A stored fp32 vector, whole."""
    return torch.cat([w.encoding.decode(w.fields)[0] for w in weights])
