"""Latent attention (DeepSeek V2, arXiv 2405.04434), with keys' and values' maps applied to queries and sums.

A token's entry in the cache is a key of `rope` rotated and `rank` latent numbers, shared by all heads, and a
value of `rope` zeros and the same latent numbers: twice what it must be, so that the cache, its laws and the
kernels are those of all other models; of DeepSeek V3, a 28th of what keys and values of all heads would be.

Shapes: T rows, D model width, H heads, K numbers of a head's key that do not rotate, R rank, P rotated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outsize.kernels.norm import RMSNorm
from outsize.model.attention import attend, spec_of, vector
from outsize.model.layers import Linear
from outsize.model.step import Step
from outsize.model_config import Description
from outsize.storage.table import Weight, Weights

EPS = 1e-6  # of the latents' norms, whatever the config says of others (transformers' class)


class LatentAttention:
    """o(values(attend(keys(q_b(x)), latent(x))))."""

    def __init__(self, d: Description, index: int, w: Weights) -> None:
        assert d.latent is not None
        self._index, self._rope, self._sizes = index, d.layers[index].rope, d.latent
        self._num_heads, self._spec = d.num_heads, spec_of(d, index)
        self._queries = None if "q_a" not in w else (Linear(w["q_a"]), _norm(w, "q_a_norm"))
        self._q_b, self._kv_a, self._o = Linear(w["q_b"]), Linear(w["kv_a"]), Linear(w["o"])
        self._latent_norm = _norm(w, "kv_a_norm")
        self._k_HRK, self._v_HVR = (_by_head(w[k], d.num_heads) for k in ("k_b", "v_b"))

    def __call__(self, x_TD: Tensor, step: Step) -> Tensor:
        rope, count, wide = self._sizes.rope, len(x_TD), step.wide
        rows = self._rows(x_TD, step)
        inner = attend(self._spec, rows.view(count, -1), self._rope, step)
        sums_THR = inner.view(count, self._num_heads, -1)[..., rope:]
        y = each_head(sums_THR, self._v_HVR, step).reshape(count, -1)
        return self._o(y, wide)

    def _rows(self, x_TD: Tensor, step: Step) -> Tensor:
        """(T, H + 2, P + R): queries, the key and the value, rotated numbers first."""
        s, heads, count, wide = self._sizes, self._num_heads, len(x_TD), step.wide
        q_TN = x_TD
        if self._queries is not None:
            q_a, norm = self._queries
            q_TN = norm(q_a(x_TD, wide).float()).to(x_TD.dtype)
        q = self._q_b(q_TN, wide).view(count, heads, s.key + s.rope)
        kv_TN = self._kv_a(x_TD, wide)
        latent_TR = self._latent_norm(kv_TN[:, : s.rank].float())
        out = x_TD.new_zeros(count, heads + 2, s.rope + s.rank)
        out[:, :heads, : s.rope] = q[..., s.key :]
        out[:, :heads, s.rope :] = each_head(q[..., : s.key], self._k_HRK, step)
        out[:, heads, : s.rope] = kv_TN[:, s.rank :]
        out[:, heads:, s.rope :] = latent_TR[:, None]
        return out


def each_head(x_THK: Tensor, w_HNK: Tensor, step: Step) -> Tensor:
    """(T, H, N): each head's numbers times its own matrix."""
    if step.wide:
        return torch.bmm(x_THK.transpose(0, 1), w_HNK.transpose(1, 2)).transpose(0, 1)
    return step.backend.heads(x_THK, w_HNK)


def _by_head(weights: tuple[Weight, ...], num_heads: int) -> Tensor:
    """(H, N, K): a view of a matrix of floats."""
    (weight,) = weights
    w_NK = weight.fields["w"]
    return w_NK.view(num_heads, -1, w_NK.shape[1])


def _norm(w: Weights, name: str) -> RMSNorm:
    return RMSNorm(vector(w[name]), EPS, torch.float32)
