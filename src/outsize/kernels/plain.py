"""The plain backend: every function in torch, on any machine. What a compiled backend lacks runs here,
too."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from outsize.kernels import attention, layouts
from outsize.kernels.backend import AttentionSpec, Backend, Experts, Places, Product
from outsize.kernels.chunks import chunks
from outsize.kernels.delta import DeltaSpec, delta_rows
from outsize.kernels.gather import Pieces, gather
from outsize.kernels.layouts import BLOCK, GROUP, TILES, CodedMatrix, decode_groups, decode_tiles
from outsize.kernels.norm import Norm, RMSNorm
from outsize.kernels.palettes import PaletteMatrix, palette_numbers
from outsize.kernels.rows import Rows
from outsize.kernels.structs import Coded, LowRankMatrix
from outsize.kv.int8 import decode

WIDE_BYTES = 8 << 20  # decoded at once: it stays in the cache until the matmul has read it
TILE_ROWS = 48  # up to here an int4 kernel beats decoding every weight, even for one long span
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "gelu": gelu,
    "relu": relu,
    "relu2": lambda x: relu(x).square(),
}
FATRELU = "fatrelu"  # as `fatrelu:0.05`: what is no larger is 0
_INT4_MM = torch.ops.aten._weight_int4pack_mm_for_cpu.default


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """Of a description's name for it."""
    kind, _, threshold = name.partition(":")
    return partial(_above, float(threshold)) if kind == FATRELU else ACTIVATIONS[kind]


def _above(threshold: float, x: Tensor) -> Tensor:
    """FATReLU (arXiv 2402.13516)."""
    return x * (x > threshold)


class Plain:
    """torch alone."""

    name = "plain"
    library: ctypes.CDLL | None = None

    @property
    def wide(self) -> Plain:
        return self

    def set_threads(self, count: int) -> None:
        """torch keeps its own."""

    def product(self, matrix: Coded) -> Product:
        if isinstance(matrix, PaletteMatrix):
            return partial(palette_product, matrix)
        return partial(tile_product if matrix.bits == TILES else group_product, matrix)

    def norm(self, h_TD: Tensor, norm: Norm) -> Tensor:
        return norm(h_TD)

    def residual(self, h_TD: Tensor, y_TD: Tensor, post: RMSNorm | None) -> None:
        h_TD.add_(y_TD if post is None else post(y_TD.float()))

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return activation_of(activation)(gate).mul_(up)

    def combine(self, inner_TF: Tensor, codes_FD: Tensor, scale_F: Tensor) -> Tensor:
        made = [_combined(row, codes_FD, scale_F) for row in inner_TF]
        return torch.stack(made).to(inner_TF.dtype)

    def chunks(self, value_TN: Tensor, gap: float) -> Tensor:
        return chunks(value_TN, gap)

    def gather(
        self, records_SB: Tensor, places_n: Tensor, pieces: Pieces, to: Tensor, at_n: Tensor
    ) -> None:
        gather(records_SB, places_n, pieces, to, at_n)

    def decode_entries(self, coded_CSX: Tensor, out_CSE: Tensor, count: int) -> None:
        decode(coded_CSX, out_CSE, count)

    def attend(self, spec: AttentionSpec, qkv: Tensor, cos_sin: Tensor, rows: Rows) -> Tensor:
        return attention.attend(spec, qkv, cos_sin, rows)

    def delta(self, spec: DeltaSpec, now: Tensor, window: Tensor, gates: Tensor) -> Tensor:
        return delta_rows(spec, now, window, gates)

    def heads(self, x_THK: Tensor, w_HNK: Tensor) -> Tensor:
        return each_head(x_THK, w_HNK)

    def lowrank(
        self, matrix: LowRankMatrix, x_TK: Tensor, y_TN: Tensor, rows: slice, wide: bool
    ) -> None:
        some = x_TK[rows]
        made = [lowrank_product(matrix, x) for x in ([some] if wide else some.split(1))]
        y_TN[rows] = (y_TN[rows].float() + torch.cat(made)).to(y_TN.dtype)

    def experts(
        self,
        experts: Experts,
        places: Sequence[Places],
        x_TD: Tensor,
        out_TKD: Tensor,
        activation: str,
    ) -> bool:
        return False

    def nested(
        self, experts: Experts, pieces: Sequence[int], x_TD: Tensor, out_TD: Tensor, activation: str
    ) -> bool:
        return False


PLAIN: Backend = Plain()


def each_head(x_THK: Tensor, w_HNK: Tensor) -> Tensor:
    """(T, H, N): each head's numbers times its own matrix, row by row: a row's bits are its own."""
    w_HKN = w_HNK.transpose(1, 2)
    return torch.cat([torch.bmm(row[:, None], w_HKN)[None, :, 0] for row in x_THK])


def _combined(inner_F: Tensor, codes_FD: Tensor, scale_F: Tensor) -> Tensor:
    """(D) fp32."""
    used = inner_F.nonzero()[:, 0]
    weight = inner_F[used].float() * scale_F[used].float()
    return linear(weight[None], codes_FD[used].float().T)[0]


def tile_product(m: CodedMatrix, x_TK: Tensor, wide: bool) -> Tensor:
    """(T, N): torch's int4 kernel where it reads our layout; many rows decode a block of weights at a
    time."""
    if wide and len(x_TK) > TILE_ROWS:

        def some(start: int, stop: int) -> Tensor:
            blocks = m.codes[start // BLOCK : stop // BLOCK]
            return decode_tiles(blocks, m.scale[:, start:stop], x_TK.dtype).T

        return wide_linear(x_TK, m.rows, some)
    if not layouts.torch_reads_tiles():
        return by_rows(x_TK, decode_tiles(m.codes, m.scale, torch.float32).T, wide)
    out: Tensor = _INT4_MM(x_TK, m.codes.view(m.rows, -1), GROUP, m.scale)
    return out


def group_product(m: CodedMatrix, x_TK: Tensor, wide: bool) -> Tensor:
    """(T, N). torch has no kernel for groups: all of them are decoded."""
    return by_rows(x_TK, decode_groups(m.bits, m.codes, m.high, m.scale), wide)


def palette_product(m: PaletteMatrix, x_TK: Tensor, wide: bool) -> Tensor:
    """(T, N). torch has no kernel for palettes: all of them are decoded."""
    return by_rows(x_TK, palette_numbers(m), wide)


def wide_linear(x_TK: Tensor, num_rows: int, decode: Callable[[int, int], Tensor]) -> Tensor:
    """x @ w.T with `decode(start, stop)` giving rows of w (n, K) in the type of x, block by block, so
    that a large matrix is never whole in its decoded form. Blocks are multiples of 64 rows."""
    step = max(64, WIDE_BYTES // (x_TK.shape[1] * x_TK.element_size()) // 64 * 64)
    if num_rows <= step:
        return linear(x_TK, decode(0, num_rows))
    out_TN = x_TK.new_empty(len(x_TK), num_rows)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        out_TN[:, start:stop] = linear(x_TK, decode(start, stop))
    return out_TN


def by_rows(x_TK: Tensor, w_NK: Tensor, wide: bool) -> Tensor:
    """x @ w.T in fp32, in the type of x. Unless wide, row by row: then a row's bits are its own."""
    rows = [linear(x, w_NK) for x in x_TK.float().split(len(x_TK) if wide else 1)]
    return torch.cat(rows).to(x_TK.dtype)


def lowrank_product(m: LowRankMatrix, x_TK: Tensor) -> Tensor:
    """(T, N) fp32: x @ A.T @ B.T, map by map."""
    inner = linear(x_TK.float(), m.a.float())
    inner = inner if m.scale is None else inner * m.scale
    inner = inner.to(x_TK.dtype).float()
    b_NR = m.b.transpose(0, 1).flatten(1).float()
    sizes = [end - start for start, end in zip((0, *m.ends), m.ends, strict=False)]
    split = zip(inner.chunk(len(sizes), dim=1), b_NR.split(sizes), strict=True)
    return torch.cat([linear(i, b) for i, b in split], dim=1)
