"""What the C files are handed: structures of sizes and pointers, beside the tensors that they point into.

A tensor that stays where it is (weights, factors, constants) is checked once, when its structure is made;
what a step computes is checked at each call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from outsize.kernels.layouts import TILES, CodedMatrix
from outsize.kernels.palettes import PaletteMatrix, offset_levels

CHUNK = 256  # entries of a cache that attention reads at once, as in attend.c
_P, _L, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


_LIKE = {
    kind: torch.empty(0, dtype=kind, device="cpu")
    for kind in (torch.bfloat16, torch.float32, torch.uint8)
}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """For C, whatever torch's default type and device are. A step calls this some 400 times: `new_empty`
    takes 1 us where `torch.empty` takes 4."""
    return _LIKE[dtype].new_empty(shape)


def address(tensor: Tensor, dtype: torch.dtype) -> int:
    """Where C finds a tensor's numbers. Raises TypeError for one that it would misread: of another type, on
    another device, or with gaps."""
    if tensor.dtype is not dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise TypeError(
            f"a kernel wants a contiguous {dtype} on the CPU, and was handed {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )
    return tensor.data_ptr()


def address_if(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    """The same; None (C's null) for no tensor."""
    return None if tensor is None else address(tensor, dtype)


class Delta(ctypes.Structure):
    """Of the gated delta rule, as in delta.c."""

    _fields_ = (
        ("key_heads", _L), ("value_heads", _L), ("key", _L), ("value", _L), ("kernel", _L), ("tiled", _L),
        ("conv", _P),
    )  # fmt: skip


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("bits", _L), ("rows", _L), ("width", _L), ("codes", _P), ("high", _P), ("scale", _P),
        ("palette", _P),
    )  # fmt: skip


class _Palette(ctypes.Structure):
    _fields_ = (
        ("group", _L), ("step_kind", _L), ("low_kind", _L), ("step", _P), ("block", _P), ("low", _P),
        ("low_block", _P), ("outer", _P), ("levels", _P), ("stride", _L), ("offset", _L), ("unit", _F),
    )  # fmt: skip


# Their numbers in palettes.c.
KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.int8: 3, torch.uint8: 4}
ZERO = 5
SIGNED = 128  # what C adds to levels of a tile's own


class NativePalette:
    """A matrix in palettes as palettes.c wants it, checked; keeps its tensors alive."""

    __slots__ = ("_levels", "_palette", "coded", "pointer", "rows", "struct", "width")

    def __init__(self, coded: PaletteMatrix) -> None:
        self.coded, self.rows, self.width = coded, coded.rows, coded.width
        form, f = coded.form, coded.fields
        step, low = f["step"], f.get("low")
        low_kind = 0 if low is None else ZERO if form.low == "zero" else KINDS[low.dtype]
        own = f.get("levels")  # where they are: a slot's change with the record that is in it
        levels, offset = offset_levels(form) if own is None else (own, SIGNED)
        self._levels, stride = levels, 0 if own is None else 1 << form.bits
        self._palette = _Palette(
            form.group, KINDS[step.dtype], low_kind, address(step, step.dtype),
            address_if(f.get("block"), torch.float16), None if low is None else address(low, low.dtype),
            address_if(f.get("low_block"), torch.float16), address_if(f.get("outer"), torch.float32),
            address_if(levels, torch.uint8 if own is None else torch.int8), stride, offset, form.unit,
        )  # fmt: skip
        codes, palette = address(f["codes"], torch.uint8), ctypes.addressof(self._palette)
        self.struct = _Matrix(form.bits, self.rows, self.width, codes, None, None, palette)
        self.pointer = ctypes.addressof(self.struct)


class NativeMatrix:
    """An encoded matrix as groups.c and tiles.c want it, checked; keeps its tensors alive."""

    __slots__ = ("coded", "codes", "pointer", "rows", "scale", "struct", "width")

    def __init__(self, coded: CodedMatrix) -> None:
        self.coded, self.rows, self.width = coded, coded.rows, coded.width
        self.codes = address(coded.codes, torch.uint8)
        high = address_if(coded.high, torch.uint8)
        kind = torch.bfloat16 if coded.bits == TILES else torch.float16
        self.scale = address(coded.scale, kind)
        self.struct = _Matrix(coded.bits, self.rows, self.width, self.codes, high, self.scale, None)
        self.pointer = ctypes.addressof(self.struct)


Coded = CodedMatrix | PaletteMatrix


def native_matrix(coded: Coded) -> NativeMatrix | NativePalette:
    return NativePalette(coded) if isinstance(coded, PaletteMatrix) else NativeMatrix(coded)


class _Expert(ctypes.Structure):
    _fields_ = (("gate_up", _Matrix), ("down", _Matrix))


class Place(ctypes.Structure):
    """A row that chose an expert, as its choice number `slot`, and how much it weighs."""

    _fields_ = (("row", _L), ("slot", _L), ("weight", ctypes.c_double))


class ExpertMatrices:
    """One expert, as experts.c wants it; keeps its tensors alive."""

    __slots__ = ("_kept", "inner", "pointer", "struct", "width")

    def __init__(self, gate_up: Coded, down: Coded) -> None:
        self._kept = native_matrix(gate_up), native_matrix(down)
        self.width, self.inner = gate_up.width, down.width
        self.struct = _Expert(*[matrix.struct for matrix in self._kept])
        self.pointer = ctypes.addressof(self.struct)


class _LowRank(ctypes.Structure):
    _fields_ = (
        ("parts", _L), ("rank", _L), ("width", _L), ("outputs", _L), ("ends", _P), ("a", _P), ("b", _P),
        ("scale", _P),
    )  # fmt: skip


class LowRankMatrix:
    """Factors of P stacked linear maps (LoRA), for any backend: A (P * R, K) and B in pairs of ranks by
    output (R / 2, N, 2), bf16, or int8 codes with the scales of A's rows, fp32. `ends`: of each map's
    outputs.

    `pointer`: as lowrank.c wants them; 0 where it cannot, since sizes are not multiples of its registers'.
    `room`: bf16 numbers that codes are decoded into.
    """

    __slots__ = ("_table", "a", "b", "ends", "inner", "pointer", "room", "scale", "struct")

    def __init__(self, a: Tensor, b: Tensor, scale: Tensor | None, ends: Sequence[int]) -> None:
        self.a, self.b, self.scale, self.ends = a, b, scale, tuple(ends)
        self.inner, width = a.shape
        self.pointer, (half, outputs, _) = 0, b.shape
        self.room = 0 if scale is None else max(a.numel(), b.numel())
        if width % 32 or any(end % 16 for end in ends):
            return
        self._table = (_L * len(ends))(*ends)
        kind = torch.bfloat16 if scale is None else torch.int8
        self.struct = _LowRank(
            len(ends), 2 * half, width, outputs, ctypes.addressof(self._table), address(a, kind),
            address(b, kind), address_if(scale, torch.float32),
        )  # fmt: skip
        self.pointer = ctypes.addressof(self.struct)

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.scale is None else self.scale.nbytes)


class Attention(ctypes.Structure):
    """A layer's attention, as attend.c wants it."""

    _fields_ = (
        ("heads", _L), ("kv_heads", _L), ("head_dim", _L), ("window", _L),
        ("scale", _F), ("eps", _F), ("bias", _P), ("norm", _P), ("sinks", _P), ("cap", _F),
    )  # fmt: skip


class AttentionSpan(NamedTuple):
    """What one row of attention sees: entries [first, seen) of its sequence's cache, and its own block
    [start, slot], which is empty for ordinary rows. `slot`: where its own entry goes."""

    slot: int
    first: int
    seen: int
    start: int

    @property
    def num_chunks(self) -> int:
        """Runs of up to CHUNK entries that it reads."""
        chunks = (self.seen - 1) // CHUNK - self.first // CHUNK + 1
        return chunks + (self.start <= self.slot)


class AttentionTable:
    """The attention spans of a step's rows, as attend.c wants them; `store` says where each sequence's
    entries are."""

    def __init__(self, spans: Sequence[Sequence[AttentionSpan]]) -> None:
        """`spans`: of each sequence's rows."""
        flat = [(0, s.slot, 0, s.first, s.seen, s.start, 0, 0) for rows in spans for s in rows]
        self._cells = np.array(flat, dtype=np.int64)
        self.most_chunks = max(s.num_chunks for rows in spans for s in rows)
        self.pointer = self._cells.ctypes.data
        ends = np.cumsum([len(rows) for rows in spans]).tolist()
        self._rows = [slice(end - len(rows), end) for end, rows in zip(ends, spans, strict=True)]

    def store(self, number: int, stored: Tensor, coded: Tensor | None) -> None:
        """Sequence `number` has its entries in `stored` (2J, capacity, E), and, if it keeps them in 8 bits,
        in `coded` (2J, capacity, ...); those of mask tokens are not kept."""
        cells = self._cells[self._rows[number]]
        cells[:, 0], cells[:, 2] = stored.data_ptr(), stored.shape[1]
        if coded is not None:
            is_kept = cells[:, 5] > cells[:, 1]
            cells[:, 6], cells[:, 7] = is_kept * coded.data_ptr(), coded.shape[1]
