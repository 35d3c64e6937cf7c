"""The native backend: the C files of csrc/, compiled for this machine. Shapes as there; bf16 unless said.

Steps of few rows run here whole; of those of many, matrices of any number of rows, norms and gates, and the
rest is torch's (plain.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from outsize.kernels import attention
from outsize.kernels.backend import AttentionSpec, Experts, Places, Product
from outsize.kernels.chunks import NativeChunks
from outsize.kernels.delta import DeltaSpec
from outsize.kernels.gather import NativeGather, Pieces
from outsize.kernels.layouts import TILES
from outsize.kernels.native_delta import NativeDelta
from outsize.kernels.native_heads import NativeHeads
from outsize.kernels.native_nested import NativeNested
from outsize.kernels.norm import LayerNorm, Norm, RMSNorm
from outsize.kernels.palettes import PaletteMatrix
from outsize.kernels.plain import TILE_ROWS, Plain, palette_product, tile_product, wide_linear
from outsize.kernels.rows import Rows
from outsize.kernels.spans import Spans
from outsize.kernels.structs import (
    Coded,
    LowRankMatrix,
    NativeMatrix,
    NativePalette,
    Place,
    address,
    empty,
)
from outsize.kernels.wide import Wide

SMALL = 256 << 10  # bytes of scratch that are kept for single tokens
PASS = 48  # rows that a kernel multiplies at once, as in numbers.h
PALETTE_ROWS = 48  # the same, of palettes
GROUP_ROWS = 16  # beyond, with fast bf16, decoding every weight once and one matmul are faster
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # their numbers in rows.c
BF16, FP32, COMPLEX = torch.bfloat16, torch.float32, torch.complex64
_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
SIGNATURES: dict[str, list[Any]] = {
    "set_threads": [_I],
    "norm_rows": [_P, _P, _F, _P, _L, _L],
    "residual_rows": [_P, _P, _P, _F, _L, _L],
    "gate_rows": [_P, _P, _L, _L, _I],
    "combine_rows": [_P, _P, _P, _P, _L, _L, _L],
    "attend_rows": [_P, _P, _P, _P, _L, _L, _P, _P],
    "decode_entries": [_P, _P, _P, _L],
    "group_linear": [_P, _P, _P, _L, _I, _P],
    "group_decode": [_P, _P],
    "tile_linear": [_P, _P, _P, _P, _L, _L, _L, _P],
    "tile_decode": [_P, _P, _P, _L, _L, _L, _L],
    "palette_linear": [_P, _P, _P, _L, _I, _P],
    "palette_decode": [_P, _P, _L, _L],
    "lowrank_rows": [_P, _P, _P, _L, _P],
    "expert_rows": [_P, _P, _P, _L, _P, _P, _L, _L, _I, _P],
}


def _function(lib: ctypes.CDLL, name: str) -> Callable[..., None]:
    function = lib[name]
    function.argtypes, function.restype = SIGNATURES[name], None
    return function


class Native(Plain):
    """The functions of the C files. One thread at a time: they share memory to compute in."""

    name = "native"
    library: ctypes.CDLL

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.library = lib
        found = {name: _function(lib, name) for name in SIGNATURES}
        self._set_threads, self._attend = found["set_threads"], found["attend_rows"]
        self._spans = Spans(lib, tiles=attention.keeps_kernels())
        self._decode_entries = found["decode_entries"]
        self._norm, self._residual = found["norm_rows"], found["residual_rows"]
        self._gate, self._lowrank = found["gate_rows"], found["lowrank_rows"]
        self._combine, self._delta = found["combine_rows"], NativeDelta(lib)
        self._heads, self._chunks = NativeHeads(lib), NativeChunks(lib)
        self._gather = NativeGather(lib)
        self._group_linear, self._group_decode = found["group_linear"], found["group_decode"]
        self._tile_linear, self._tile_decode = found["tile_linear"], found["tile_decode"]
        self._palette_linear = found["palette_linear"]
        self._palette_decode = found["palette_decode"]
        self._expert_rows, self._nested = found["expert_rows"], NativeNested(lib)
        self._multiplies_bf16 = bool(lib.bf16_products())  # else in fp32, as fast as torch does
        self._kept, self._small = empty(0), empty(SMALL, dtype=torch.uint8)

    def set_threads(self, count: int) -> None:
        self._set_threads(count)

    def product(self, matrix: Coded) -> Product:
        if isinstance(matrix, PaletteMatrix):
            return partial(self._palettes, NativePalette(matrix))
        run = self._tiles if matrix.bits == TILES else self._groups
        return partial(run, NativeMatrix(matrix))

    def _groups(self, m: NativeMatrix, x_TK: Tensor, wide: bool) -> Tensor:
        """x may be fp32, too."""
        rows = len(x_TK)
        if wide and rows > GROUP_ROWS and self._multiplies_bf16:
            return wide_linear(x_TK, m.rows, lambda a, b: self._some_groups(m, a, b).to(x_TK.dtype))
        x_TK, is_fp32 = x_TK.contiguous(), x_TK.dtype is FP32
        out = empty(rows, m.rows, dtype=FP32 if is_fp32 else BF16)
        scratch = self._scratch(min(rows, PASS) * m.width * 4)
        x = address(x_TK, out.dtype)
        self._group_linear(m.pointer, x, out.data_ptr(), rows, is_fp32, scratch.data_ptr())
        return out

    def _some_groups(self, m: NativeMatrix, start: int, stop: int) -> Tensor:
        """(n, K) bf16: some rows, decoded. Valid until the next call."""
        some = m if stop - start == m.rows else NativeMatrix(m.coded.some(start, stop))
        out = self._room(some.rows, m.width)
        self._group_decode(some.pointer, out.data_ptr())
        return out

    def _tiles(self, m: NativeMatrix, x_TK: Tensor, wide: bool) -> Tensor:
        if x_TK.dtype is not BF16:
            return tile_product(m.coded, x_TK, wide)
        count = len(x_TK)
        if wide and count > TILE_ROWS and self._multiplies_bf16:
            return wide_linear(x_TK, m.rows, partial(self._some_tiles, m))
        x_TK, room = x_TK.contiguous(), m.width // 32 * (1 if self._multiplies_bf16 else 18)
        out = empty(count, m.rows)
        scratch = self._scratch(4 * min(count, PASS) * room)
        self._tile_linear(
            m.codes, m.scale, address(x_TK, BF16), out.data_ptr(), m.rows, m.width, count,
            scratch.data_ptr(),
        )  # fmt: skip
        return out

    def _some_tiles(self, m: NativeMatrix, start: int, stop: int) -> Tensor:
        """(n, K) bf16: some rows, in multiples of 64, decoded. Valid until the next call."""
        out = self._room(m.width, stop - start)
        self._tile_decode(m.codes, m.scale, out.data_ptr(), m.rows, m.width, start, stop - start)
        return out.T

    def _palettes(self, m: NativePalette, x_TK: Tensor, wide: bool) -> Tensor:
        """x may be fp32, too."""
        count, is_fp32 = len(x_TK), x_TK.dtype is FP32
        if wide and is_fp32:
            return palette_product(m.coded, x_TK, wide)
        if wide and count > PALETTE_ROWS and self._multiplies_bf16:
            return wide_linear(x_TK, m.rows, partial(self._some_palettes, m))
        x_TK, out = x_TK.contiguous(), empty(count, m.rows, dtype=FP32 if is_fp32 else BF16)
        scratch, x = self._scratch(4 * min(count, PASS) * m.width), address(x_TK, out.dtype)
        self._palette_linear(m.pointer, x, out.data_ptr(), count, is_fp32, scratch.data_ptr())
        return out

    def _some_palettes(self, m: NativePalette, start: int, stop: int) -> Tensor:
        """(n, K) bf16: some rows, in multiples of 16, decoded. Valid until the next call."""
        out = self._room(m.width, stop - start)
        self._palette_decode(m.pointer, out.data_ptr(), start, stop - start)
        return out.T

    def _scratch(self, size: int) -> Tensor:
        """Bytes that a C function computes in."""
        return self._small if size <= SMALL else empty(size, dtype=torch.uint8)

    def _room(self, rows: int, width: int) -> Tensor:
        """(rows, width) bf16 of memory that is kept from call to call: taken anew each time, a few MB
        between other sizes, it left holes in the heap worth twice the scratch."""
        if len(self._kept) < rows * width:
            self._kept = empty(rows * width)
        return self._kept[: rows * width].view(rows, width)

    @property
    def wide(self) -> Plain:
        return Wide(self, self._spans)

    def norm(self, h_TD: Tensor, norm: Norm) -> Tensor:
        if isinstance(norm, LayerNorm):
            return norm(h_TD)
        rows, width = h_TD.shape
        out = empty(rows, width)
        self._norm(address(h_TD, FP32), norm.pointer, norm.eps, out.data_ptr(), rows, width)
        return out

    def residual(self, h_TD: Tensor, y_TD: Tensor, post: RMSNorm | None) -> None:
        if y_TD.dtype is FP32:  # the sum of a mixture's experts
            super().residual(h_TD, y_TD, post)
            return
        rows, width = h_TD.shape
        weight, eps = (None, 0.0) if post is None else (post.pointer, post.eps)
        y = address(y_TD.contiguous(), BF16)
        self._residual(address(h_TD, FP32), y, weight, eps, rows, width)

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        if activation not in ACTIVATIONS:
            return super().gate(gate_up, activation)
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out, x = empty(rows, width), address(gate_up, BF16)
        self._gate(x, out.data_ptr(), rows, width, ACTIVATIONS[activation])
        return out

    def combine(self, inner_TF: Tensor, codes_FD: Tensor, scale_F: Tensor) -> Tensor:
        if inner_TF.dtype is not BF16:
            return super().combine(inner_TF, codes_FD, scale_F)
        (rows, num), width = inner_TF.shape, codes_FD.shape[1]
        out, codes = empty(rows, width), address(codes_FD, torch.int8)
        inner, scale = address(inner_TF, BF16), address(scale_F, BF16)
        self._combine(inner, codes, scale, out.data_ptr(), rows, num, width)
        return out

    def attend(self, spec: AttentionSpec, qkv: Tensor, cos_sin: Tensor, rows: Rows) -> Tensor:
        table, qkv = rows.table(spec.layer, spec.sight, spec.stores), qkv.contiguous()
        count, most = len(qkv), table.most_chunks
        width, task = spec.num_heads * spec.head_dim, spec.num_heads // spec.num_kv_heads
        task *= spec.head_dim + 2
        queries = (count * width + 1) // 2
        scratch = self._scratch(4 * (queries + count * spec.num_kv_heads * most * task))
        out = empty(count, width)
        self._attend(
            spec.pointer, address(qkv, BF16), address(cos_sin, COMPLEX), table.pointer, count, most,
            scratch.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out

    def chunks(self, value_TN: Tensor, gap: float) -> Tensor:
        return self._chunks(value_TN, gap)

    def gather(
        self, records_SB: Tensor, places_n: Tensor, pieces: Pieces, to: Tensor, at_n: Tensor
    ) -> None:
        self._gather(records_SB, places_n, pieces, to, at_n)

    def decode_entries(self, coded_CSX: Tensor, out_CSE: Tensor, count: int) -> None:
        if out_CSE.dtype is not BF16:
            super().decode_entries(coded_CSX, out_CSE, count)
            return
        heads, capacity, width = out_CSE.shape
        shape = (_L * 4)(heads, coded_CSX.shape[1], capacity, width)
        self._decode_entries(coded_CSX.data_ptr(), out_CSE.data_ptr(), shape, count)

    def delta(self, spec: DeltaSpec, now: Tensor, window: Tensor, gates: Tensor) -> Tensor:
        if window.dtype is not BF16:
            return super().delta(spec, now, window, gates)
        return self._delta(spec, now, window, gates)

    def heads(self, x_THK: Tensor, w_HNK: Tensor) -> Tensor:
        if not self._heads.takes(x_THK):
            return super().heads(x_THK, w_HNK)
        return self._heads(x_THK, w_HNK)

    def lowrank(
        self, matrix: LowRankMatrix, x_TK: Tensor, y_TN: Tensor, rows: slice, wide: bool
    ) -> None:
        if not matrix.pointer:
            super().lowrank(matrix, x_TK, y_TN, rows, wide)
            return
        count = rows.stop - rows.start
        scratch = self._scratch(2 * (count * matrix.inner + matrix.room))
        x = address(x_TK, BF16) + 2 * rows.start * x_TK.shape[1]
        y = address(y_TN, BF16) + 2 * rows.start * y_TN.shape[1]
        self._lowrank(matrix.pointer, x, y, count, scratch.data_ptr())

    def experts(
        self,
        experts: Experts,
        places: Sequence[Places],
        x_TD: Tensor,
        out_TKD: Tensor,
        activation: str,
    ) -> bool:
        some = [e for e in experts if e is not None]
        num, kind = len(experts), ACTIVATIONS.get(activation)
        if len(some) < num or kind is None or not num:
            return False
        width, inner, most = some[0].width, some[0].inner, max(map(len, places))
        pointers = (_P * num)(*[e.pointer for e in some])
        counts = (_L * num)(*[len(p) for p in places])
        cells = (Place * sum(counts))(*[Place(*cell) for p in places for cell in p])
        scratch = self._scratch(2 * most * (2 * max(width, inner) + 2 * width + 3 * inner))
        self._expert_rows(
            pointers, counts, cells, num, address(x_TD, BF16), address(out_TKD, FP32), out_TKD.shape[1],
            most, kind, scratch.data_ptr(),
        )  # fmt: skip
        return True

    def nested(
        self, experts: Experts, pieces: Sequence[int], x_TD: Tensor, out_TD: Tensor, activation: str
    ) -> bool:
        some, kind = [e for e in experts if e is not None], ACTIVATIONS.get(activation)
        if len(some) < len(experts) or kind is None or x_TD.dtype is not BF16:
            return False
        self._nested(some, pieces, x_TD, out_TD, kind)
        return True
