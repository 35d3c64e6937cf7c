"""The sampler head of multi-token prediction: mixes a mask token's state and the token chosen just before
into a state that the model's own head reads (arXiv 2507.11851, section 3.4; the way around the mixer is ours:
it starts as the plain head, and a short training can only add to it).

Shapes: D width. Leading axes are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm, silu

EPS = 1e-5
PREFIX = "sampler."  # of its tensors among those of a drafter
STAGES = ("first", "second")
Product = Callable[[Tensor], Tensor]  # with a matrix of the head, in the type of its input


class Stage(NamedTuple):
    """One of the head's layers."""

    product: Product
    bias: Tensor
    norm: Tensor
    shift: Tensor


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
    out = {
        name: torch.zeros(shape, dtype=torch.float32, device="cpu")
        for name, shape in shapes(width).items()
    }
    for name in ("first.weight", "second.weight"):
        out[name].normal_(0.0, 1 / math.sqrt(out[name].shape[1]), generator=generator)
    out["first.norm"].fill_(1.0)
    return out


def stages(
    weights: Mapping[str, Tensor], product: Callable[[Tensor], Product]
) -> tuple[Stage, ...]:
    """The head, its products with its matrices by `product`; none without tensors."""

    def stage(name: str) -> Stage:
        rest = (weights[f"{name}.{part}"] for part in ("bias", "norm", "shift"))
        return Stage(product(weights[f"{name}.weight"]), *rest)

    return tuple(stage(name) for name in STAGES) if weights else ()


def plainly(weight: Tensor) -> Product:
    """Products with a matrix as it is."""
    return lambda x: linear(x, weight.to(x.dtype))


def mix(z: Tensor, previous: Tensor, head: Sequence[Stage]) -> Tensor:
    """(..., D): a mask token's normed state and the embedding of the token before its prediction -> the state
    whose logits are the prediction's."""
    x = torch.cat([_unit(previous).to(z.dtype), _unit(z)], dim=-1)
    for stage in head:
        x = silu(stage.product(x) + stage.bias.to(x.dtype))
        x = layer_norm(x, x.shape[-1:], stage.norm.to(x.dtype), stage.shift.to(x.dtype), EPS)
    return z + x


def _unit(x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], None, EPS)
