"""The seam between the model and what computes it: every function that `encoding/`, `weights/` and `model/`
hand to a backend. plain.py is torch alone and runs anywhere; native.py is C compiled for this machine.

Law: a backend equals `plain` within the rounding of its activations (tests/laws/test_native.py), and in a
narrow step a row's bits do not depend on the other rows (tests/laws/test_invariance.py). Shapes: T rows, D
model width, K inputs and N outputs of a linear map, H query heads, E numbers a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from outsize.kernels.delta import DeltaSpec
from outsize.kernels.gather import Pieces
from outsize.kernels.norm import Norm, RMSNorm
from outsize.kernels.rows import Rows, Sight
from outsize.kernels.structs import Attention, Coded, ExpertMatrices, LowRankMatrix, address_if

Product = Callable[[Tensor, bool], Tensor]  # (x (T, K), is it wide?) -> (T, N) in the type of x
Experts = Sequence[ExpertMatrices | None]  # None: not for kernels
Places = Sequence[tuple[int, int, float]]  # row, number among its choices, weight


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention, for any backend: sizes, and tensors that never change, fp32. `window`: how many
    entries a row sees, itself among them (None: all); `bias` of query, key and value; `norm` of query and key
    heads; `sinks`: each head's score of attending to nothing; `cap`: scores x are cap * tanh(x / cap), if it
    is not 0; `chunked`: a row sees entries of its own piece of `window` positions; `stores`: False where keys
    and values are those that an earlier sub-layer of this step stored in `layer`."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    bias: Tensor | None = None
    norm: RMSNorm | None = None
    sinks: Tensor | None = None
    cap: float = 0.0
    chunked: bool = False
    stores: bool = True
    struct: Attention = field(init=False)
    pointer: int = field(init=False)

    @property
    def sight(self) -> Sight:
        """What a row sees."""
        return Sight(self.window, self.chunked)

    def __post_init__(self) -> None:
        norm, eps = (None, 0.0) if self.norm is None else (self.norm.pointer, self.norm.eps)
        bias, sinks = address_if(self.bias, torch.float32), address_if(self.sinks, torch.float32)
        struct = Attention(
            self.num_heads, self.num_kv_heads, self.head_dim, self.window or 0, self.scale, eps, bias,
            norm, sinks, self.cap,
        )  # fmt: skip
        object.__setattr__(self, "struct", struct)
        object.__setattr__(self, "pointer", ctypes.addressof(struct))


class Backend(Protocol):
    """Where numbers are computed."""

    @property
    def name(self) -> str: ...

    @property
    def library(self) -> ctypes.CDLL | None:
        """The compiled C files, whose threads read records (storage/reader.py); None without them."""
        ...

    @property
    def wide(self) -> Backend:
        """What steps of many rows run on."""
        ...

    def set_threads(self, count: int) -> None:
        """How many threads compute from now on, for the process."""
        ...

    def product(self, matrix: Coded) -> Product:
        """x -> x @ w.T. The matrix is checked here, once; valid while its tensors are where they are."""
        ...

    def norm(self, h_TD: Tensor, norm: Norm) -> Tensor:
        """What enters a linear map: the residual stream (fp32), normed, in the type of activations."""
        ...

    def residual(self, h_TD: Tensor, y_TD: Tensor, post: RMSNorm | None) -> None:
        """h += y, or h += post(y). Changes h (fp32)."""
        ...

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        """activation(gate) * up: (T, 2F) -> (T, F)."""
        ...

    def combine(self, inner_TF: Tensor, codes_FD: Tensor, scale_F: Tensor) -> Tensor:
        """(T, D) of inner activations and rows of codes (int8) with a scale (bf16) each, which zeros
        leave out: a row's result does not depend on those that it does not use."""
        ...

    def chunks(self, value_TN: Tensor, gap: float) -> Tensor:
        """(T, N) which bundles of neurons to read, where a run of neighbours costs `gap` once
        (kernels/chunks.py)."""
        ...

    def gather(
        self, records_SB: Tensor, places_n: Tensor, pieces: Pieces, to: Tensor, at_n: Tensor
    ) -> None:
        """A field of the records at these places, put where a matrix has it (kernels/gather.py)."""
        ...

    def decode_entries(self, coded_CSX: Tensor, out_CSE: Tensor, count: int) -> None:
        """The first entries of a cache that is kept in 8 bits (kv/int8.py), as numbers."""
        ...

    def attend(self, spec: AttentionSpec, qkv: Tensor, cos_sin: Tensor, rows: Rows) -> Tensor:
        """(T, H*E) of the projections (T, (H + 2J)*E): bias, norms, rotation by `cos_sin` (T, 1, E/2)
        complex, storing of keys and values in each sequence's cache, attention."""
        ...

    def delta(self, spec: DeltaSpec, now: Tensor, window: Tensor, gates: Tensor) -> Tensor:
        """The gated delta rule of few rows of one sequence, whose numbers `now` they change
        (kernels/delta.py)."""
        ...

    def heads(self, x_THK: Tensor, w_HNK: Tensor) -> Tensor:
        """(T, H, N) of few rows: each head's numbers times its own matrix."""
        ...

    def lowrank(
        self, matrix: LowRankMatrix, x_TK: Tensor, y_TN: Tensor, rows: slice, wide: bool
    ) -> None:
        """Add the factors' product to some rows of y. Both contiguous; changes y."""
        ...

    def experts(
        self,
        experts: Experts,
        places: Sequence[Places],
        x_TD: Tensor,
        out_TKD: Tensor,
        activation: str,
    ) -> bool:
        """Several experts in one call: fill `out` (fp32) at each place's (row, choice) with that expert's
        output times the weight. False where there is no kernel for these: then the caller runs them one by
        one."""
        ...

    def nested(
        self, experts: Experts, pieces: Sequence[int], x_TD: Tensor, out_TD: Tensor, activation: str
    ) -> bool:
        """Nested experts in one call: fill `out` (fp32) with each row's sum of the first few experts, so many
        as `pieces` says, in order. False where there is no kernel for these, as for `experts`."""
        ...
