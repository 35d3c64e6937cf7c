"""Which bundles of neurons to read, where a run of neighbours is one read (after Neuron Chunking, arXiv
2511.18692, whose choice is greedy): the plain twin of csrc/chunks.c, and that.

A bundle has a value: its importance, less the price of its bytes; beginning a run costs `gap`. The set of
most value less costs is found exactly, by a Viterbi of two states (read, left out), of which only their
difference d is kept: it matters between -gap and 0 alone, so d[i] = value[i] + min(0, max(-gap, d[i - 1])).
With a gap of 0 these are the bundles of positive value. Shapes: T rows, N bundles.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from outsize.kernels.structs import address

_P, _L, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


def chunks(value_TN: Tensor, gap: float) -> Tensor:
    """(T, N) is it read?, of values in fp32. The gap is no less than 0, and of fp32, too."""
    rows = [_row(row, -gap) for row in value_TN.tolist()]
    return torch.tensor(rows, dtype=torch.bool, device="cpu").view(value_TN.shape)


def _row(value: Sequence[float], least: float) -> list[bool]:
    """Of one row, in Python's numbers, which are C's double."""
    d, differences = least, list[float]()
    for v in value:
        d = v + ((d if d < 0 else 0.0) if d > least else least)
        differences.append(d)
    reads, out = d > 0, list[bool]()
    for before in (*reversed(differences[:-1]), 0.0):
        out.append(reads)
        reads = before > (least if reads else 0.0)
    return out[::-1]


class NativeChunks:
    """`chunk_rows` of the C files."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library["chunk_rows"]
        self._run.argtypes, self._run.restype = [_P, _P, _P, _L, _L, _F], None

    def __call__(self, value_TN: Tensor, gap: float) -> Tensor:
        """(T, N)."""
        rows, count = value_TN.shape
        out = torch.empty(rows, count, dtype=torch.bool, device="cpu")
        room = torch.empty(count, dtype=torch.float64, device="cpu")
        value = address(value_TN, torch.float32)
        self._run(value, out.data_ptr(), room.data_ptr(), rows, count, gap)
        return out
