"""The sampler head of mask drafts: what a mask saw, and the token chosen just before, mixed into a state
that the model's own head reads (arXiv 2507.11851, section 3.4; the way around the mixer is ours: it starts
as the plain head, and a short training can only add to it).

Shapes: D width. Leading axes are free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm, silu

EPS = 1e-5
PREFIX = "sampler."  # of its tensors among those of a drafter


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """The head's tensors."""
    vector = (width,)
    return {
        "first.weight": (width, 2 * width), "first.bias": vector,
        "first.norm": vector, "first.shift": vector,
        "second.weight": (width, width), "second.bias": vector,
        "second.norm": vector, "second.shift": vector,
    }  # fmt: skip


def of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's tensors among those of a drafter; none if it has no head."""
    return {k.removeprefix(PREFIX): t for k, t in tensors.items() if k.startswith(PREFIX)}


def new(width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A head that changes nothing yet: its last norm is zero."""
    out = {name: torch.zeros(shape) for name, shape in shapes(width).items()}
    for name in ("first.weight", "second.weight"):
        out[name].normal_(0.0, 1 / math.sqrt(out[name].shape[1]), generator=generator)
    out["first.norm"].fill_(1.0)
    return out


def mix(z: Tensor, previous: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """(..., D): a mask's normed state and the embedding of the token before its guess -> the state whose
    logits are the guess's."""
    x = torch.cat([_unit(previous).to(z.dtype), _unit(z)], dim=-1)
    for name in ("first", "second"):
        x = silu(
            linear(x, weights[f"{name}.weight"].to(x.dtype), weights[f"{name}.bias"].to(x.dtype))
        )
        norm, shift = weights[f"{name}.norm"].to(x.dtype), weights[f"{name}.shift"].to(x.dtype)
        x = layer_norm(x, x.shape[-1:], norm, shift, EPS)
    return z + x


def _unit(x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], None, EPS)
