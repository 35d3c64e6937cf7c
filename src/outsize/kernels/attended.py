"""How much some rows attend to each entry of a cache: what attention weighs entries by, averaged over heads.
Attention's own kernels never write that down; for a few rows it is one small product more.

Shapes: R rows, S stored entries, H query heads, J key heads, G = H / J, E numbers a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from outsize.kernels.attention import capped, rotate
from outsize.kernels.backend import AttentionSpec

BLOCK = 512  # entries at once: products of one size, whatever the length of the cache
SCORES = 1 << 18  # scores at once


def attended(
    spec: AttentionSpec,
    qkv_RN: Tensor,
    cos_sin: Tensor,
    rows: Sequence[int],
    kv: tuple[Tensor, Sequence[int]],
) -> Tensor:
    """(S,) fp32: of each entry, the share of attention that rows (their projections, rotary angles and
    positions) give it, summed over them. `kv`: the layer's entries (C, S, E), and their positions. Changes
    `qkv_RN`."""
    kv_CSE, keys_S = kv
    q_RHE = queries(spec, qkv_RN, cos_sin)
    keys = torch.tensor(keys_S, dtype=torch.int64, device="cpu")
    total_S = torch.zeros(len(keys), dtype=torch.float32, device="cpu")
    step = max(1, SCORES // (spec.num_heads * len(keys)))
    for at in range(0, len(q_RHE), step):
        some = torch.tensor(rows[at : at + step], dtype=torch.int64, device="cpu")
        score_HRS = _scores(q_RHE[at : at + step], kv_CSE[: spec.num_kv_heads]) * spec.scale
        score_HRS = capped(score_HRS, spec.cap)
        apart_RS = some[:, None] - keys
        unseen = apart_RS < 0
        if spec.window is not None:
            least = [spec.sight.least(position) for position in rows[at : at + step]]
            unseen |= keys < torch.tensor(least, dtype=torch.int64, device="cpu")[:, None]
        score_HRS.masked_fill_(unseen, -torch.inf)
        if spec.sinks is not None:
            nothing = spec.sinks.view(-1, 1, 1).expand(-1, len(some), 1)
            score_HRS = torch.cat([score_HRS, nothing], dim=-1)
        total_S += score_HRS.softmax(-1)[..., : len(keys)].mean(0).sum(0)
    return total_S


def queries(spec: AttentionSpec, qkv_RN: Tensor, cos_sin: Tensor) -> Tensor:
    """(R, H, E) in the type of activations: bias, norm and rotation, as `attend` does them."""
    dtype, width = qkv_RN.dtype, spec.num_heads * spec.head_dim
    q_RN = qkv_RN[:, :width].float()
    if spec.bias is not None:
        q_RN = q_RN + spec.bias[:width]
    q_RHE = q_RN.reshape(len(q_RN), spec.num_heads, spec.head_dim)
    if spec.norm is not None:
        n = spec.norm
        q_RHE = type(n)(n.weight[: spec.num_heads], n.eps, torch.float32)(q_RHE)
    return rotate(q_RHE, cos_sin).to(dtype)


def _scores(q_RHE: Tensor, k_JSE: Tensor) -> Tensor:
    """(H, R, S) fp32, in products of equal sizes: the library keeps a kernel for each size it has seen."""
    num_kv, size, head_dim = k_JSE.shape
    num_rows = len(q_RHE)
    q_JNE = (
        q_RHE.view(num_rows, num_kv, -1, head_dim).permute(1, 2, 0, 3).reshape(num_kv, -1, head_dim)
    )
    out = torch.empty(num_kv, q_JNE.shape[1], size, dtype=torch.float32, device="cpu")
    for start in range(0, size, BLOCK):
        some = k_JSE[:, start : start + BLOCK]
        count = some.shape[1]
        if count < BLOCK and q_RHE.dtype == torch.bfloat16:
            some = pad(some, (0, 0, 0, BLOCK - count))
        out[:, :, start : start + count] = torch.bmm(q_JNE, some.transpose(1, 2))[:, :, :count]
    return out.view(-1, num_rows, size)
