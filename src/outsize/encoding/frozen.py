"""Gradients through stored weights: to the input only, since a pack never changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from outsize.kernels.backend import Product


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


def frozen(run: Product, decode: Callable[[], Tensor]) -> Product:
    """run(x, wide), with the gradient of x @ decode().T where x wants one."""

    def product(x_TK: Tensor, wide: bool) -> Tensor:
        if not x_TK.requires_grad:
            return run(x_TK, wide)
        out: Tensor = _Frozen.apply(x_TK, lambda x: run(x, wide), decode)  # type: ignore[no-untyped-call]
        return out

    return product
