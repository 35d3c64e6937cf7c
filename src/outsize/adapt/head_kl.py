"""Divergence of predictions through frozen heads, some rows at a time, as adapt/head_loss.py: over the whole
vocabulary, and nothing is kept of the former predictions but their normed states.

Shapes: N predictions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from outsize.adapt import head_loss
from outsize.adapt.head_loss import head_loss as cross_entropy


class _HeadKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_ND: Tensor, former_ND: Tensor, head_VD: Tensor) -> Tensor:
        kind = torch.promote_types(head_VD.dtype, torch.float32)
        loss, grad_ND = torch.zeros((), dtype=kind, device=z_ND.device), torch.empty_like(z_ND)
        rows = max(1, head_loss.CHUNK_BYTES[z_ND.device.type] // (8 * len(head_VD)))
        for z, former, grad in zip(
            z_ND.split(rows), former_ND.split(rows), grad_ND.split(rows), strict=True
        ):
            q, p = (linear(x.to(head_VD.dtype), head_VD).to(kind) for x in (z, former))
            q -= q.logsumexp(-1, keepdim=True)
            p -= p.logsumexp(-1, keepdim=True)
            share = p.exp()
            loss += (share * p.sub_(q)).sum()
            grad.copy_(q.exp_().sub_(share).to(head_VD.dtype) @ head_VD)
        ctx.save_for_backward(grad_ND.div_(len(z_ND)))
        return loss / len(z_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None


def head_kl(z_ND: Tensor, former_ND: Tensor, head_VD: Tensor) -> Tensor:
    """Mean KL of the former states' predictions from those of `z_ND`, in nats; differentiable in `z_ND`
    alone."""
    return torch.as_tensor(_HeadKL.apply(z_ND, former_ND, head_VD))  # type: ignore[no-untyped-call]


@torch.no_grad()
def likeliest(states_ND: Tensor, head_VD: Tensor) -> Tensor:
    """(N,) the likeliest token of each prediction."""
    rows = max(1, head_loss.CHUNK_BYTES[states_ND.device.type] // (4 * len(head_VD)))
    found = [linear(x.to(head_VD.dtype), head_VD).argmax(-1) for x in states_ND.split(rows)]
    return torch.cat(found)


SHARE = 0.9  # of the mixed label, that is the teacher's first choice (arXiv 2407.21075)


def mixed_loss(z_ND: Tensor, former_ND: Tensor, label_N: Tensor, head_VD: Tensor) -> Tensor:
    """Mean cross-entropy of a label that is .9 the former model's first choice and .1 the text's token."""
    first = likeliest(former_ND, head_VD)
    own, said = (cross_entropy(z_ND, label, head_VD) for label in (first, label_N))
    return SHARE * own + (1 - SHARE) * said
