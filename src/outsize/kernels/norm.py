"""RMSNorm's weight, made ready once: torch computes with it here, kernels find it by its address."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from outsize.kernels.structs import address


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32 (arXiv 1910.07467); gives `dtype`.

    Written as x / hypot(|x|, sqrt(n * eps)) * (sqrt(n) * weight): the same number in small operations;
    torch's rms_norm takes twice as long on one row.
    """

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype) -> None:
        width = weight.shape[-1]
        self.weight, self.eps = weight.contiguous(), eps
        self.pointer = address(self.weight, torch.float32)
        self._weight = weight * math.sqrt(width)
        self._floor = torch.tensor(math.sqrt(width * eps), dtype=torch.float32, device="cpu")
        self._dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._floor)
        return torch.div(x, norm).mul_(self._weight).to(self._dtype)
