"""A long span's attention in C, where the processor multiplies bf16 and has no tile registers (AMX), with
which torch's own is fast. A row's bits depend on its query and what it sees alone, however a prompt is cut.

The plain twin is kernels/attention.py: attend_span.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from outsize.kernels import attention
from outsize.kernels.backend import AttentionSpec
from outsize.kernels.structs import address_if

LANES = 32  # numbers of a head are a multiple of it
_L, _F, _P = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _Span(ctypes.Structure):
    """As spans.c wants it."""

    _fields_ = (
        ("heads", _L), ("kv_heads", _L), ("head_dim", _L), ("rows", _L), ("capacity", _L), ("count", _L),
        ("scale", _F), ("cap", _F), ("sinks", _P),
    )  # fmt: skip


class Spans:
    """Attention of long spans by spans.c, or by torch where that cannot take them."""

    def __init__(self, library: ctypes.CDLL, tiles: bool) -> None:
        """`tiles`: the processor has tile registers."""
        self._attend = library["attend_span"]
        self._attend.argtypes, self._attend.restype = [_P] * 6, ctypes.c_int
        self._is_on = bool(library.bf16_products()) and not tiles

    def attend(
        self,
        q_THE: Tensor,
        queries_T: Sequence[int],
        kv_CSE: Tensor,
        keys_S: Sequence[int],
        spec: AttentionSpec,
    ) -> Tensor:
        """(T, H*E): as `attention.attend_span`."""
        num_heads, size, head_dim = kv_CSE.shape
        fits = head_dim % LANES == 0 and kv_CSE.stride()[1:] == (head_dim, 1)
        if self._is_on and fits and q_THE.dtype is torch.bfloat16:
            lo, hi = _seen(queries_T, keys_S, spec)
            q_THE = q_THE.contiguous()
            span = _Span(
                spec.num_heads, num_heads // 2, head_dim, len(q_THE), kv_CSE.stride(0) // head_dim, size,
                spec.scale, spec.cap, address_if(spec.sinks, torch.float32),
            )  # fmt: skip
            out = torch.empty_like(q_THE)
            if self._attend(
                ctypes.byref(span), q_THE.data_ptr(), kv_CSE.data_ptr(), lo.ctypes.data, hi.ctypes.data,
                out.data_ptr(),
            ):  # fmt: skip
                return out.flatten(1)
        return attention.attend_span(q_THE, queries_T, kv_CSE, keys_S, spec)


def _seen(
    queries: Sequence[int], keys: Sequence[int], spec: AttentionSpec
) -> tuple[np.ndarray, np.ndarray]:
    """The entries that each query sees: from, and up to, by their positions."""
    at, last = np.asarray(keys, dtype=np.int64), np.asarray(queries, dtype=np.int64)
    hi = np.searchsorted(at, last, side="right")
    if spec.window is None:
        return np.zeros(len(last), dtype=np.int64), hi
    least = np.asarray([spec.sight.least(position) for position in queries], dtype=np.int64)
    return np.searchsorted(at, least), hi
