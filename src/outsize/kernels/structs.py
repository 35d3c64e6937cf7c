"""Matrices as the C files see them: structures of pointers, beside the tensors that they point into."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_P, _L = ctypes.c_void_p, ctypes.c_long


def address(tensor: Tensor, dtype: torch.dtype) -> int:
    """Where C finds a tensor's numbers. Raises TypeError for one that it would misread: of another type, on
    another device, or with gaps."""
    if tensor.dtype is not dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise TypeError(
            f"a kernel wants a contiguous {dtype} on the CPU, and was handed {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )
    return tensor.data_ptr()


def _parts(
    bits: int, codes: Tensor, high: Tensor | None, scale: Tensor
) -> tuple[int, int | None, int]:
    """Addresses of a matrix's fields."""
    kind = torch.bfloat16 if bits == TILES else torch.float16
    fifth = None if high is None else address(high, torch.uint8)
    return address(codes, torch.uint8), fifth, address(scale, kind)


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("bits", _L), ("rows", _L), ("width", _L), ("codes", _P), ("high", _P), ("scale", _P),
    )  # fmt: skip


TILES = 0  # the number of bits that says int4 tiles


class _Expert(ctypes.Structure):
    _fields_ = (("gate_up", _Matrix), ("down", _Matrix))


class Place(ctypes.Structure):
    """A row that chose an expert, as its choice number `slot`, and how much it weighs."""

    _fields_ = (("row", _L), ("slot", _L), ("weight", ctypes.c_double))


class NativeMatrix(NamedTuple):
    """A matrix in memory that stays where it is: (rows, width) in groups of so many bits, or tiles."""

    bits: int
    rows: int
    width: int
    codes: Tensor
    high: Tensor | None
    scale: Tensor

    def struct(self) -> _Matrix:
        parts = _parts(self.bits, self.codes, self.high, self.scale)
        return _Matrix(self.bits, self.rows, self.width, *parts)


class ExpertMatrices:
    """One expert, as experts.c wants it; keeps its tensors alive."""

    __slots__ = ("_kept", "inner", "pointer", "struct", "width")

    def __init__(self, gate_up: NativeMatrix, down: NativeMatrix) -> None:
        self._kept = gate_up, down
        self.width, self.inner = gate_up.width, down.width
        self.struct = _Expert(gate_up.struct(), down.struct())
        self.pointer = ctypes.addressof(self.struct)


class GroupMatrix:
    """A matrix in groups, as groups.c wants it. Valid while its tensors are."""

    __slots__ = ("num_rows", "pointer", "struct", "width")

    def __init__(self, bits: int, codes: Tensor, high: Tensor | None, scale: Tensor) -> None:
        self.num_rows, groups = scale.shape
        self.width = groups * 32
        parts = _parts(bits, codes, high, scale)
        self.struct = _Matrix(bits, self.num_rows, self.width, *parts)
        self.pointer = ctypes.addressof(self.struct)


class _LowRank(ctypes.Structure):
    _fields_ = (
        ("parts", _L), ("rank", _L), ("width", _L), ("outputs", _L), ("ends", _P), ("a", _P), ("b", _P),
        ("scale", _P),
    )  # fmt: skip


class LowRankMatrix:
    """Factors of stacked maps, as lowrank.c wants them: A (parts * R, K), B (R / 2, N, 2), bf16, or int8
    codes with the scales of A's rows, fp32. `room`: bf16 numbers that codes are decoded into."""

    __slots__ = ("_kept", "inner", "pointer", "room", "struct")

    def __init__(self, a: Tensor, b: Tensor, scale: Tensor | None, ends: Sequence[int]) -> None:
        parts, (half, outputs, _) = len(ends), b.shape
        table = (_L * parts)(*ends)
        self._kept, self.inner = (a, b, scale, table), len(a)
        self.room = 0 if scale is None else max(a.numel(), b.numel())
        scales = None if scale is None else address(scale, torch.float32)
        kind = torch.bfloat16 if scale is None else torch.int8
        self.struct = _LowRank(
            parts, 2 * half, a.shape[1], outputs, ctypes.addressof(table), address(a, kind),
            address(b, kind), scales
        )  # fmt: skip
        self.pointer = ctypes.addressof(self.struct)
