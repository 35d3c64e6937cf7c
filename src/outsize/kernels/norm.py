"""A norm's weight, made ready once: torch computes with it here, kernels find RMSNorm's by its address."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

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


class LayerNorm:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in fp32 (arXiv 1607.06450); gives
    `dtype`."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.eps, self._dtype = weight, bias, eps, dtype

    def __call__(self, x: Tensor) -> Tensor:
        made: Tensor = layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return made.to(self._dtype)


Norm = RMSNorm | LayerNorm


def norm_of(vectors: Mapping[str, Tensor], name: str, eps: float, dtype: torch.dtype) -> Norm:
    """The norm whose weight has this name; with a bias, it is a LayerNorm."""
    bias = vectors.get(f"{name}_bias")
    if bias is None:
        return RMSNorm(vectors[name], eps, dtype)
    return LayerNorm(vectors[name], bias, eps, dtype)
