"""The sub-layers of a layer: attention, and a feed-forward (dense, or a mixture of experts).

Shapes: T rows, D model width, H query heads, J key heads, E numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from outsize.kernels.norm import Norm, RMSNorm, norm_of
from outsize.model.attention import Attention, vector
from outsize.model.ffn.dense import Dense, Ungated
from outsize.model.ffn.experts import Mixture, Router, SharedExpert
from outsize.model.latent import LatentAttention
from outsize.model.layers import Linear
from outsize.model.step import Step
from outsize.model_config import Description
from outsize.model_config import Mixture as MixtureConfig
from outsize.storage.table import Weights, activation_type
from outsize.weights.experts import ExpertBank


Body = Callable[[Tensor, Step], Tensor]


class Runnable(Protocol):
    """Half a layer over weights in memory."""

    def run(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        """Run all chunks of rows, in order. Changes their residual streams (T, D)."""
        ...


class SubLayer:
    """h += scale * post(body(norm(h)) + bias), in place; few families have the norm after the body, the bias
    or the scale, or no norm before."""

    def __init__(
        self,
        norm: Norm | torch.dtype | None,
        body: Body,
        post: RMSNorm | None = None,
        bias_D: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        """`norm`: or the type that enters the body as it is; None: what attention read does."""
        self._norm, self._body, self._post, self._bias_D = norm, body, post, bias_D
        self._scale = scale

    def __call__(self, h_TD: Tensor, step: Step) -> None:
        y_TD = self._body(self._read(h_TD, step), step)
        step.residual(h_TD, y_TD, self._post, self._bias_D, self._scale)

    def _read(self, h_TD: Tensor, step: Step) -> Tensor:
        """What enters the body."""
        norm = self._norm
        if norm is None:
            return step.read.pop()
        return h_TD.to(norm) if isinstance(norm, torch.dtype) else step.backend.norm(h_TD, norm)

    def run(self, chunks: Sequence[tuple[Tensor, Step]]) -> None:
        for h_TD, step in chunks:
            self(h_TD, step)


def attention_sublayer(d: Description, index: int, w: Weights) -> SubLayer:
    kind = Attention if d.latent is None else LatentAttention
    body: Body = kind(d, index, w)
    bias_D = vector(w["o_bias"]) if d.o_bias else None
    norm = _pre(d, w, "attn_norm", activation_type(w["o"]))
    body = _shown(body) if d.parallel else body
    return SubLayer(norm, body, _post(d, w, "attn_post_norm"), bias_D, d.residual_scale)


def _shown(attention: Body) -> Body:
    """Attention whose layer's feed-forward reads what it reads."""

    def body(x_TD: Tensor, step: Step) -> Tensor:
        step.read[:] = [x_TD]
        return attention(x_TD, step)

    return body


def ffn_sublayer(d: Description, index: int, w: Weights) -> SubLayer:
    norm = None if d.parallel else _pre(d, w, "ffn_norm", activation_type(w["gate_up"]))
    inner_bias, bias_D = (
        (vector(w["gate_up_bias"]), vector(w["down_bias"])) if d.mlp_bias else (None, None)
    )
    kind = Dense if d.gated else Ungated
    dense = kind(Linear(w["gate_up"]), Linear(w["down"]), d.activation, index, inner_bias)
    return SubLayer(norm, dense, _post(d, w, "ffn_post_norm"), bias_D, d.residual_scale)


def mixture_sublayer(d: Description, bank: ExpertBank, w: Weights) -> Mixture:
    norm = RMSNorm(vector(w["ffn_norm"]), d.norm_eps, bank.activation_type)
    (router,) = w["router"]
    bias = vector(w["router_bias"]) if "router_bias" in w else None
    choice = vector(w["choice_bias"]) if "choice_bias" in w else None
    made = mixture_of(d)
    shared = shared_expert(d, w) if made.shared else None
    numbers = router.encoding.decode(router.fields)
    return Mixture(d, Router(norm, numbers, made, bias, choice), bank, shared)


def mixture_of(d: Description) -> MixtureConfig:
    assert d.mixture is not None
    return d.mixture


def shared_expert(d: Description, w: Weights) -> SharedExpert:
    """The expert that all tokens use."""
    gate_D = vector(w["shared_router"]) if "shared_router" in w else None
    dense = Dense(Linear(w["shared_gate_up"]), Linear(w["shared_down"]), d.activation)
    return SharedExpert(dense, gate_D)


def _pre(d: Description, w: Weights, name: str, dtype: torch.dtype) -> Norm | torch.dtype:
    if not d.pre_norm:
        return dtype
    found = {n: vector(w[n]) for n in (name, f"{name}_bias") if n in w}
    return norm_of(found, name, d.norm_eps, dtype)


def _post(d: Description, w: Weights, name: str) -> RMSNorm | None:
    return RMSNorm(vector(w[name]), d.norm_eps, torch.float32) if d.post_norm else None
