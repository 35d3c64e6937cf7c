"""The compiled kernels as functions of tensors. Shapes as in the C files."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from outsize.kernels.build import built
from outsize.kernels.structs import ExpertMatrices, GroupMatrix, LowRankMatrix, Place, address

CHUNK = 256
PASS = 48  # as in numbers.h
BF16, FP32, TURNS = torch.bfloat16, torch.float32, torch.complex64
_P, _L, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """For C, whatever torch's default type and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


class _Attention(ctypes.Structure):
    _fields_ = (
        ("heads", _L), ("kv_heads", _L), ("head_dim", _L), ("window", _L),
        ("scale", _F), ("eps", _F), ("bias", _P), ("norm", _P), ("sinks", _P),
    )  # fmt: skip


class AttentionSpec:
    """What a layer's attention kernel needs to know; keeps the tensors it points to alive."""

    def __init__(
        self,
        heads: tuple[int, int, int],
        window: int | None,
        scale: float,
        eps: float,
        bias: Tensor | None,
        norm: Tensor | None,
        sinks: Tensor | None = None,
    ) -> None:
        self.heads, self.window = heads, window or 0
        self._kept = bias, norm, sinks
        pointers = [address(t, FP32) if t is not None else None for t in self._kept]
        self.struct = _Attention(*heads, self.window, scale, eps, *pointers)
        self.pointer = ctypes.addressof(self.struct)


class AttentionSpan(NamedTuple):
    """One row of attention: where its entry goes, and what it sees: entries [first, seen), and its own
    block [start, slot], which is empty for ordinary rows."""

    slot: int
    first: int
    seen: int
    start: int

    @property
    def parts(self) -> int:
        chunks = (self.seen - 1) // CHUNK - self.first // CHUNK + 1
        return chunks + (self.start <= self.slot)


class AttentionTable:
    """The rows of a step, as attend.c wants them; `store` says where each sequence's entries are."""

    def __init__(self, rows: Sequence[Sequence[AttentionSpan]]) -> None:
        """`rows`: of each sequence."""
        flat = [(0, r.slot, 0, r.first, r.seen, r.start) for part in rows for r in part]
        self._cells = np.array(flat, dtype=np.int64)
        self.most_parts = max(r.parts for part in rows for r in part)
        self.pointer = self._cells.ctypes.data
        ends = np.cumsum([len(part) for part in rows]).tolist()
        self._parts = [slice(end - len(part), end) for end, part in zip(ends, rows, strict=True)]

    def store(self, number: int, stored: Tensor) -> None:
        """Sequence `number` keeps its entries in `stored` (2J, capacity, E)."""
        rows = self._parts[number]
        self._cells[rows, 0] = stored.data_ptr()
        self._cells[rows, 2] = stored.shape[1]


class Kernels:
    """The functions of the C files here. All tensors contiguous; bf16 unless said."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.library = lib
        lib.set_threads.argtypes, lib.set_threads.restype = [ctypes.c_int], None
        self.set_threads: Callable[[int], None] = lib.set_threads  # for the process
        self._kept = _empty(0)
        self._norm, self._residual = lib.norm_rows, lib.residual_rows
        self._gate, self._attend = lib.gate_rows, lib.attend_rows
        self._norm.argtypes = [_P, _P, _F, _P, _L, _L]
        self._residual.argtypes = [_P, _P, _P, _F, _L, _L]
        self._gate.argtypes = [_P, _P, _L, _L, ctypes.c_int]
        self._attend.argtypes = [_P, _P, _P, _P, _L, _L, _P, _P]
        self._linear, self._decode = lib.group_linear, lib.group_decode
        self._linear.argtypes = [_P, _P, _P, _L, ctypes.c_int, _P]
        self._decode.argtypes = [_P, _P]
        self._tile = lib.tile_decode
        self._tile.argtypes = [_P, _P, _P, _L, _L, _L, _L]
        self._lowrank = lib.lowrank_rows
        self._lowrank.argtypes = [_P, _P, _P, _L, _P]
        self._tiles = lib.tile_linear
        self._tiles.argtypes = [_P, _P, _P, _P, _L, _L, _L, _P]
        self._experts = lib.expert_rows
        self._experts.argtypes = [_P, _P, _P, _L, _P, _P, _L, _L, ctypes.c_int, _P]
        self.multiplies_bf16 = bool(
            lib.bf16_products()
        )  # else in fp32, as fast as torch does, or faster
        for function in (
            self._norm, self._residual, self._gate, self._attend, self._linear, self._decode,
            self._tile, self._tiles, self._lowrank, self._experts,
        ):  # fmt: skip
            function.restype = None

    def group_linear(self, matrix: GroupMatrix, x_TK: Tensor) -> Tensor:
        """(T, N) in the type of x, bf16 or fp32."""
        rows, x_TK = len(x_TK), x_TK.contiguous()
        wide = x_TK.dtype is FP32
        out = _empty(rows, matrix.num_rows, dtype=FP32 if wide else BF16)
        scratch = _empty(min(rows, PASS) * matrix.width * 4, dtype=torch.uint8)
        x = address(x_TK, out.dtype)
        self._linear(matrix.pointer, x, out.data_ptr(), rows, wide, scratch.data_ptr())
        return out

    def _room(self, rows: int, width: int) -> Tensor:
        """(rows, width) bf16 of memory that is kept from call to call: taken anew each time, a few MB
        between other sizes, it left holes in the heap worth twice the scratch."""
        if len(self._kept) < rows * width:
            self._kept = _empty(rows * width)
        return self._kept[: rows * width].view(rows, width)

    def group_decode(self, matrix: GroupMatrix) -> Tensor:
        """(N, K) bf16, valid until the next call."""
        out = self._room(matrix.num_rows, matrix.width)
        self._decode(matrix.pointer, out.data_ptr())
        return out

    def tile_decode(self, packed: Tensor, scales: Tensor, first: int, count: int) -> Tensor:
        """(K, count) bf16 of an int4 matrix: some rows, in multiples of 64. Valid until the next call."""
        groups, rows, _ = scales.shape
        out = self._room(groups * 32, count)
        codes, steps = address(packed, torch.uint8), address(scales, BF16)
        self._tile(codes, steps, out.data_ptr(), rows, groups * 32, first, count)
        return out

    def tile_linear(self, packed: Tensor, scales: Tensor, x_TK: Tensor) -> Tensor:
        """(T, N) bf16. The matrix's fields are views of a record, of the types that its encoding states."""
        groups, rows, _ = scales.shape
        count, x_TK = len(x_TK), x_TK.contiguous()
        out = _empty(count, rows)
        scratch = _empty(
            min(count, PASS) * groups * (1 if self.multiplies_bf16 else 18), dtype=FP32
        )
        self._tiles(
            packed.data_ptr(), scales.data_ptr(), address(x_TK, BF16), out.data_ptr(), rows, groups * 32,
            count, scratch.data_ptr(),
        )  # fmt: skip
        return out

    def norm(self, h_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """fp32 -> bf16."""
        rows, width = h_TD.shape
        out = _empty(rows, width)
        self._norm(address(h_TD, FP32), address(weight_D, FP32), eps, out.data_ptr(), rows, width)
        return out

    def residual(self, h_TD: Tensor, y_TD: Tensor, weight_D: Tensor | None, eps: float) -> None:
        """Changes h_TD (fp32)."""
        rows, width = h_TD.shape
        weight = None if weight_D is None else address(weight_D, FP32)
        self._residual(address(h_TD, FP32), address(y_TD, BF16), weight, eps, rows, width)

    def gate(self, gate_up: Tensor, kind: int) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = _empty(rows, width)
        self._gate(address(gate_up, BF16), out.data_ptr(), rows, width, kind)
        return out

    def attend(
        self, spec: AttentionSpec, qkv: Tensor, turns_TE: Tensor, rows: AttentionTable
    ) -> Tensor:
        """(T, H*E). Fills each row's entry."""
        num_heads, num_kv, head_dim = spec.heads
        count, most = len(qkv), rows.most_parts
        task = num_heads // num_kv * (head_dim + 2)
        scratch = _empty(
            (count * num_heads * head_dim + 1) // 2 + count * num_kv * most * task, dtype=FP32
        )
        out = _empty(count, num_heads * head_dim)
        self._attend(
            spec.pointer, address(qkv, BF16), address(turns_TE, TURNS), rows.pointer, count, most,
            scratch.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out

    def lowrank(
        self, matrix: LowRankMatrix, x_TK: Tensor, y_TN: Tensor, first: int, count: int
    ) -> None:
        """Changes some rows of y. Both contiguous, bf16."""
        scratch = _empty(count * matrix.inner + matrix.room)
        x = address(x_TK, BF16) + 2 * first * x_TK.shape[1]
        y = address(y_TN, BF16) + 2 * first * y_TN.shape[1]
        self._lowrank(matrix.pointer, x, y, count, scratch.data_ptr())

    def experts(
        self,
        experts: Sequence[ExpertMatrices],
        places: Sequence[Sequence[tuple[int, int, float]]],
        x_TD: Tensor,
        out_TKD: Tensor,
        kind: int,
    ) -> None:
        """Fills out_TKD (fp32) at each place's (row, slot) with that expert's output times the weight."""
        num, most = len(experts), max(map(len, places))
        width, inner = experts[0].width, experts[0].inner
        pointers = (_P * num)(*[e.pointer for e in experts])
        counts = (_L * num)(*[len(p) for p in places])
        cells = (Place * sum(counts))(*[Place(*cell) for p in places for cell in p])
        scratch = _empty(most * (2 * max(width, inner) + 2 * width + 3 * inner))
        self._experts(
            pointers, counts, cells, num, address(x_TD, BF16), address(out_TKD, FP32), out_TKD.shape[1],
            most, kind, scratch.data_ptr(),
        )  # fmt: skip


def kernels(folder: Path, tell: Callable[[str], None] | None = None) -> Kernels | None:
    """The kernels, compiled into `folder` at the first call on a machine; None without a compiler. `tell` is
    told why there are none, or why they could not be kept."""
    found = built(folder)
    if found.note and tell is not None:
        tell(found.note)
    return None if found.library is None else Kernels(found.library)
