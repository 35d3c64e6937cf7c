"""Each head's numbers times its own matrix, of few rows, in C (csrc/heads.c); plain.py has its twin."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from outsize.kernels.structs import address

_P, _L = ctypes.c_void_p, ctypes.c_long
LANES = 32  # of which a head's numbers are a multiple


class NativeHeads:
    """`each_head` of the C files, where there is a kernel for it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library["head_rows"]
        self._run.argtypes, self._run.restype = [_P, _P, _P, _L, _L, _L, _L], None

    def takes(self, x_THK: Tensor) -> bool:
        """Numbers in bf16, as many a head as registers take."""
        return x_THK.dtype is torch.bfloat16 and x_THK.shape[2] % LANES == 0

    def __call__(self, x_THK: Tensor, w_HNK: Tensor) -> Tensor:
        """(T, H, N) bf16."""
        (count, heads, width), rows = x_THK.shape, w_HNK.shape[1]
        out = torch.empty(count, heads, rows, dtype=torch.bfloat16, device="cpu")
        x_THK = x_THK.contiguous()  # and kept until it has been read
        x, w = (address(tensor, torch.bfloat16) for tensor in (x_THK, w_HNK))
        self._run(x, w, out.data_ptr(), count, heads, rows, width)
        return out
