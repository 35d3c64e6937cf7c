"""Cross-entropy through a frozen head, some rows at a time, so that the logits of all rows never exist: the
gradient of a chunk's states is made while its logits are at hand (as in arXiv 2410.10989; the head learns
nothing here, so that its own gradient is left out).

Shapes: N labels, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}  # of a chunk's logits, in fp32


class _HeadLogs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_ND: Tensor, label_N: Tensor, head_VD: Tensor) -> Tensor:
        kind, found = torch.promote_types(head_VD.dtype, torch.float32), list[Tensor]()
        grad_ND = torch.empty_like(z_ND)
        rows = max(1, CHUNK_BYTES[z_ND.device.type] // (4 * len(head_VD)))
        for z, label, grad in zip(
            z_ND.split(rows), label_N.split(rows), grad_ND.split(rows), strict=True
        ):
            logits = linear(z.to(head_VD.dtype), head_VD).to(kind)
            logits -= logits.logsumexp(-1, keepdim=True)
            found.append(logits.gather(1, label[:, None])[:, 0])
            if ctx.needs_input_grad[0]:
                probs = logits.exp_().neg_()
                probs[torch.arange(len(label), device=z.device), label] += 1
                grad.copy_(probs.to(head_VD.dtype) @ head_VD)
        ctx.save_for_backward(grad_ND)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0][:, None].to(grad_ND.dtype), None, None


class _HeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_ND: Tensor, former_ND: Tensor, head_VD: Tensor) -> Tensor:
        kind = torch.promote_types(head_VD.dtype, torch.float32)
        loss, grad_ND = torch.zeros((), dtype=kind, device=z_ND.device), torch.empty_like(z_ND)
        rows = max(1, CHUNK_BYTES[z_ND.device.type] // (4 * len(head_VD)))
        for z, former, grad in zip(
            z_ND.split(rows), former_ND.split(rows), grad_ND.split(rows), strict=True
        ):
            new, old = (
                linear(x.to(head_VD.dtype), head_VD).to(kind).log_softmax(-1) for x in (z, former)
            )
            due = old.exp()
            loss += (due * (old - new)).sum()
            grad.copy_((new.exp_() - due).to(head_VD.dtype) @ head_VD)
        ctx.save_for_backward(grad_ND.div_(len(z_ND)))
        return loss / len(z_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None


def head_divergence(z_ND: Tensor, former_ND: Tensor, head_VD: Tensor) -> Tensor:
    """Mean divergence (KL, nats) of what states predict from what former ones did; differentiable in the
    states alone."""
    return torch.as_tensor(_HeadDivergence.apply(z_ND, former_ND, head_VD))  # type: ignore[no-untyped-call]


def head_logs(z_ND: Tensor, label_N: Tensor, head_VD: Tensor) -> Tensor:
    """(N,) log-probability of each label under the logits of states; differentiable in the states alone."""
    return torch.as_tensor(_HeadLogs.apply(z_ND, label_N, head_VD))  # type: ignore[no-untyped-call]


def head_loss(z_ND: Tensor, label_N: Tensor, head_VD: Tensor) -> Tensor:
    """Mean cross-entropy of `label_N` under the logits of states; differentiable in the states alone."""
    return -head_logs(z_ND, label_N, head_VD).mean()
