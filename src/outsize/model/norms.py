"""A sub-layer's norms: what enters its body, which may be what attention read before, and what leaves it.

Shapes: T rows, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from outsize.kernels.norm import Norm, RMSNorm, norm_of
from outsize.model.attention import vector
from outsize.model.step import Step
from outsize.model_config import Description
from outsize.storage.table import Weights

Body = Callable[[Tensor, Step], Tensor]
LAST = "final_norm", "final_norm_bias"
# A norm; or the type in which the residual stream enters as it is; None: what attention read enters.
Entry = Norm | torch.dtype | None


def entering(h_TD: Tensor, step: Step, norm: Entry) -> Tensor:
    """(T, D): what enters a body."""
    if norm is None:
        return step.read.pop()
    return h_TD.to(norm) if isinstance(norm, torch.dtype) else step.backend.norm(h_TD, norm)


def shown(attention: Body) -> Body:
    """Attention whose layer's feed-forward reads what it reads."""

    def body(x_TD: Tensor, step: Step) -> Tensor:
        step.read[:] = [x_TD]
        return attention(x_TD, step)

    return body


def pre_norm(d: Description, w: Weights, name: str, dtype: torch.dtype) -> Norm | torch.dtype:
    """What comes before a body."""
    if not d.pre_norm:
        return dtype
    found = {n: vector(w[n]) for n in (name, f"{name}_bias") if n in w}
    return norm_of(found, name, d.norm_eps, dtype)


def post_norm(d: Description, w: Weights, name: str) -> RMSNorm | None:
    """What comes after it, of families that have it."""
    return RMSNorm(vector(w[name]), d.norm_eps, torch.float32) if d.post_norm else None


def last_norm(d: Description, w: Weights) -> Norm:
    """What the head reads through."""
    found = {n: vector(ws) for n, ws in w.items() if n in LAST}
    return norm_of(found, "final_norm", d.norm_eps, torch.float32)


def learned_positions(w: Weights) -> Tensor | None:
    """(P, D) fp32: what is added at each position, of models that have learned it."""
    if "positions" not in w:
        return None
    (weight,) = w["positions"]
    return weight.encoding.decode(weight.fields)
