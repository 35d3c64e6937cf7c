"""The gated delta rule of few rows in C (csrc/delta.c); delta.py is its plain twin."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from outsize.kernels.delta import DeltaSpec
from outsize.kernels.structs import address

_P, _L = ctypes.c_void_p, ctypes.c_long


class NativeDelta:
    """`delta_rows` of the C files."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library["delta_rows"]
        self._run.argtypes, self._run.restype = [_P, _P, _P, _P, _P, _L, _P], None

    def __call__(self, spec: DeltaSpec, now: Tensor, window: Tensor, gates: Tensor) -> Tensor:
        """(T, H, V) fp32. Inputs are in bf16; changes `now` (H, K, V)."""
        x, count, channels = spec.sizes, len(gates), window.shape[1]
        out = torch.empty(count, x.value_heads, x.value, dtype=torch.float32, device="cpu")
        mixed = torch.empty(count, channels, dtype=torch.float32, device="cpu")
        gates = gates.contiguous()
        self._run(
            spec.pointer, address(window, torch.bfloat16), address(gates, torch.float32),
            address(now, torch.float32), out.data_ptr(), count, mixed.data_ptr(),
        )  # fmt: skip
        return out
