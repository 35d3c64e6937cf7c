"""Partial sums in few bits for the way between ranks: how a message lies, and the plain functions.

A row of D numbers is cut into blocks of B = 128, 64 or 32, the largest that divides D. Each block is turned:
multiplied by the orthonormal Hadamard matrix of that size, after which no number is much larger than its
neighbours (QuaRot, arXiv 2404.00456, does so to activations). The turned numbers become whole numbers of
-most to most, most = 2 ** (bits - 1) - 1, times an fp16 step. A row's message is, for each block,
B * bits / 8 bytes of codes, and after all blocks their steps: `bits` + 16 / B bits a number.

Codes are whole numbers plus 2 ** (bits - 1), in planes: byte j of a plane of w bits holds, lowest first,
those of codes j, j + B * w / 8, and so on. 4 and 8 bits are one plane; 5 are one of the low four bits and one
of the highest; 6 are one of four and one of two.

The sum over ranks is taken in turned space, in order of ranks, and turned back once: a turned sum is the sum
of the turned. csrc/wire.c computes the same bits. Nothing is calibrated, nothing saturates.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from outsize.errors import OptionError
from outsize.kernels.backend import Backend
from outsize.kernels.native import Native
from outsize.kernels.structs import address

BITS = (4, 5, 6, 8)
BLOCKS = (128, 64, 32)
LARGEST = 65504.0  # of fp16
PLANES = {4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


def block_of(width: int) -> int:
    """Numbers that are turned together. Raises OptionError."""
    found = next((b for b in BLOCKS if width % b == 0), None)
    if found is None:
        raise OptionError(
            f"rows of {width} numbers cannot be sent in few bits: 32 does not divide {width}"
        )
    return found


def row_bytes(width: int, bits: int) -> int:
    """Bytes of one row's message."""
    return width * bits // 8 + 2 * (width // block_of(width))


class Turner(Protocol):
    """Packs and sums messages of `bits` bits."""

    bits: int

    def pack(self, x_TD: Tensor, turned: bool = False) -> Tensor:
        """(T, row_bytes) uint8 of bf16 or fp32 rows; `turned`: they are in turned space already."""

    def sum(self, messages: Sequence[Tensor], width: int, turned: bool = False) -> Tensor:
        """(T, width) fp32: the messages' sum, in order; `turned`: left in turned space."""


class PlainTurner:
    def __init__(self, bits: int) -> None:
        self.bits = checked(bits)

    def pack(self, x_TD: Tensor, turned: bool = False) -> Tensor:
        rows, width = x_TD.shape
        v = x_TD.float().unflatten(1, (-1, block_of(width)))  # (T, D / B, B)
        v = v if turned else turn(v)
        most = (1 << self.bits - 1) - 1
        step = (v.abs().amax(2) / most).clamp(max=LARGEST).half()
        inverse = torch.where(step > 0, 1.0 / step.float(), 0.0)
        code = (v * inverse[..., None]).round().clamp(-most, most).to(torch.int16) + (most + 1)
        planes = _packed(self.bits, code.to(torch.uint8)).view(rows, -1)
        return torch.cat([planes, step.view(torch.uint8)], dim=1)

    def sum(self, messages: Sequence[Tensor], width: int, turned: bool = False) -> Tensor:
        rows, block, size = len(messages[0]), block_of(width), width * self.bits // 8
        zero = 1 << self.bits - 1
        total = torch.zeros(rows, width // block, block, dtype=torch.float32, device="cpu")
        for message in messages:
            planes = message[:, :size].reshape(rows, width // block, -1)
            step = message[:, size:].contiguous().view(torch.float16).float()
            total += (_unpacked(self.bits, planes, block).float() - zero) * step[..., None]
        return (total if turned else turn(total)).view(rows, width)


class NativeTurner:
    """csrc/wire.c."""

    def __init__(self, bits: int, native: Native) -> None:
        self.bits, lib = checked(bits), native.library
        self._pack, self._sum = lib["turned_pack"], lib["turned_sum"]
        self._pack.argtypes, self._pack.restype = [_P, _P, _P, _I, _I], None
        self._sum.argtypes, self._sum.restype = [_P, _L, _P, _P, _I], None

    def pack(self, x_TD: Tensor, turned: bool = False) -> Tensor:
        (rows, width), fp32 = x_TD.shape, x_TD.dtype is torch.float32
        x = x_TD.contiguous()
        out = torch.empty(rows, row_bytes(width, self.bits), dtype=torch.uint8, device="cpu")
        at = address(x, torch.float32 if fp32 else torch.bfloat16)
        self._pack(at, out.data_ptr(), self._shape(rows, width), fp32, turned)
        return out

    def sum(self, messages: Sequence[Tensor], width: int, turned: bool = False) -> Tensor:
        rows, num = len(messages[0]), len(messages)
        out = torch.empty(rows, width, dtype=torch.float32, device="cpu")
        places = (_P * num)(*[address(m, torch.uint8) for m in messages])
        self._sum(places, num, out.data_ptr(), self._shape(rows, width), turned)
        return out

    def _shape(self, rows: int, width: int) -> ctypes.Array[ctypes.c_long]:
        return (_L * 4)(rows, width, block_of(width), self.bits)


def turner(bits: int, backend: Backend) -> Turner:
    """On the C kernels where there are some. Raises OptionError for bits that there are not."""
    return NativeTurner(bits, backend) if isinstance(backend, Native) else PlainTurner(bits)


def checked(bits: int) -> int:
    if bits not in BITS:
        raise OptionError(
            f"sums between ranks can be of {', '.join(map(str, BITS))} or 16 bits, not {bits}"
        )
    return bits


def turn(x: Tensor) -> Tensor:
    """Hadamard's transform of the last dimension, orthonormal: its own inverse. fp32."""
    block, half = x.shape[-1], 1
    while half < block:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return x * (1 / math.sqrt(block))


def _packed(bits: int, code: Tensor) -> Tensor:
    """(..., B) codes -> (..., B * bits / 8) bytes."""
    planes, low = [], 0
    for w in PLANES[bits]:
        some = (code >> low & (1 << w) - 1).unflatten(-1, (8 // w, -1))  # (..., slot, byte)
        byte = some[..., 0, :]
        for slot in range(1, 8 // w):
            byte = byte | some[..., slot, :] << slot * w
        planes.append(byte)
        low += w
    return torch.cat(planes, dim=-1)


def _unpacked(bits: int, planes: Tensor, block: int) -> Tensor:
    code, at, low = None, 0, 0
    for w in PLANES[bits]:
        byte = planes[..., at : at + block * w // 8]
        slots = [byte >> slot * w & (1 << w) - 1 for slot in range(8 // w)]
        some = torch.cat(slots, dim=-1) << low
        code = some if code is None else code | some
        at, low = at + block * w // 8, low + w
    assert code is not None
    return code
