"""Gradients through stored weights: to the input only, since a pack never changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, run: Callable[[Tensor], Tensor], decode: Callable[[], Tensor]
    ) -> Tensor:
        ctx.decode = decode
        return run(x_TK.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_TN,) = grads
        return (grad_TN.float() @ ctx.decode()).to(grad_TN.dtype), None, None


def frozen_linear(
    x_TK: Tensor, run: Callable[[Tensor], Tensor], decode: Callable[[], Tensor]
) -> Tensor:
    """run(x), with the gradient of x @ decode().T."""
    out: Tensor = _Frozen.apply(x_TK, run, decode)  # type: ignore[no-untyped-call]
    return out
