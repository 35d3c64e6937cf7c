"""Nested experts of few rows in C (csrc/experts.c)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from outsize.kernels.structs import ExpertMatrices, address

_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class NativeNested:
    """`nested_rows` of the C files."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library["nested_rows"]
        self._run.argtypes, self._run.restype = [_P, _P, _L, _P, _P, _I, _P], None

    def __call__(
        self,
        experts: Sequence[ExpertMatrices],
        pieces: Sequence[int],
        x_TD: Tensor,
        out_TD: Tensor,
        kind: int,
    ) -> None:
        """Fill `out` (fp32) with each row's sum of the first few experts. x in bf16."""
        rows, width, inner = len(x_TD), experts[0].width, experts[0].inner
        pointers = (_P * len(experts))(*[e.pointer for e in experts])
        room = 2 * rows * (2 * max(width, inner) + 2 * width + 3 * inner) + 8 * rows
        scratch = torch.empty(room, dtype=torch.uint8, device="cpu")
        self._run(
            pointers, (_L * rows)(*pieces), rows, address(x_TD, torch.bfloat16),
            address(out_TD, torch.float32), kind, scratch.data_ptr(),
        )  # fmt: skip
