"""Trainable model: a differentiable copy of a dense pack, as plain tensors on a device. Gradients reach its
inputs and what is added to its linear maps; the weights themselves never change.

Shapes: B sequences, T new rows, S stored rows, D width, H query heads, J key heads, E numbers a head,
V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import layer_norm, linear, rms_norm, scaled_dot_product_attention

from outsize.adapt.change import AS_IS, Change
from outsize.errors import UnsupportedError
from outsize.model.attention import vector
from outsize.model.layers import cos_sin
from outsize.model_config import Description, Rope
from outsize.pack.format import Pack
from outsize.pack.records import POSITIONS
from outsize.plan.probe import instruction_sets
from outsize.progress import Progress
from outsize.storage.table import Weight, Weights
from outsize.weights.layers import resident
from outsize.weights.load import load
from outsize.weights.rows import RowTable

ROWS = 4096  # of a row table decoded at once
# Not cuDNN's: its gradients are NaN for some heads with large scores (Qwen2.5 on an H100, torch 2.11).
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Stored = tuple[Tensor, Tensor]  # one layer's keys and values, (B, J, S, E) each


class Rows(NamedTuple):
    """Rows to run: their embeddings, positions, and which keys each may see (stored ones first)."""

    h_BTD: Tensor
    positions_BT: Tensor
    allow_BTS: Tensor


def matmul_type(device: torch.device) -> torch.dtype:
    """What a device multiplies fastest: bf16, or fp32 on processors without instructions for it."""
    quick = {"avx512_bf16", "amx_bf16", "bf16"} & set(instruction_sets())
    return torch.bfloat16 if quick or device.type == "cuda" else torch.float32


def number_type(pack: Pack, device: torch.device) -> torch.dtype:
    """What enters the products of a model that is opened to train on."""
    is_fp32 = pack.table_of("attn-0").tensors["o"][0].encoding == "fp32"
    return torch.float32 if is_fp32 else matmul_type(device)


def check_usual(pack: Pack) -> None:
    """Raises UnsupportedError for what is not trained on."""
    if not pack.description.is_usual:
        raise UnsupportedError(
            f"{pack.path.name} is a {pack.description.family} model; training knows dense models without "
            "sinks, of RMSNorms and gated feed-forwards"
        )


class TrainableModel:
    """The network. `dtype` is what enters a matmul; the residual stream is fp32 (fp64 in fp64)."""

    def __init__(
        self, pack: Pack, device: torch.device, dtype: torch.dtype, progress: Progress
    ) -> None:
        d = pack.description
        if not d.is_measured:
            raise UnsupportedError(
                f"{pack.path.name} is a {d.family} model; training knows dense models without sinks"
            )
        self.description, self.device, self.dtype = d, device, dtype
        self.residual = torch.float64 if dtype == torch.float64 else torch.float32
        loaded = load(pack, progress=progress)
        try:
            self.embed_VD = self._table(loaded.embed, d)
            tied = loaded.head is loaded.embed
            self.head_VD = self.embed_VD if tied else self._table(loaded.head, d)
            final = self._matrices(loaded.final_norm)
            self.positions_PD = final.pop(POSITIONS, None)
            pinned = ({**resident(a), **resident(f)} for a, f in loaded.layers)
            self._layers = [*(self._matrices(weights) for weights in pinned), final]
        finally:
            loaded.close()
        self._cos_sin: dict[Rope, Tensor] = {}

    def _table(self, table: RowTable, d: Description) -> Tensor:
        parts = torch.arange(d.vocab_size).split(ROWS)
        return torch.cat([table.rows(ids).to(self.dtype) for ids in parts]).to(self.device)

    def _vector(self, weights: tuple[Weight, ...]) -> Tensor:
        return vector(weights).to(self.device, self.residual)

    def _matrices(self, weights: Weights) -> dict[str, Tensor]:
        out = {}
        for name, parts in weights.items():
            if name.endswith(("norm", "bias")):
                out[name] = self._vector(parts)
                continue
            kind = self.residual if name == POSITIONS else self.dtype
            rows = [w.encoding.decode(w.fields)[: w.num_rows].to(kind) for w in parts]
            out[name] = torch.cat(rows).to(self.device)
        return out

    def embed(self, ids: Tensor) -> Tensor:
        """(..., D) in the residual stream's type."""
        return self.embed_VD[ids].to(self.residual) * self.description.embed_scale

    def run(
        self, rows: Rows, stored: Sequence[Stored] | None = None, change: Change = AS_IS
    ) -> tuple[Tensor, list[Stored]]:
        """The residual stream after the last layer (B, T, D), normed; and each layer's new keys and
        values."""
        h, made = self._through(rows, range(self.description.num_layers), stored, change)
        return self.normed(h), made

    def through(self, rows: Rows, layers: range, change: Change = AS_IS) -> Tensor:
        """The residual stream (B, T, D) after some layers, of rows that are what went into the first."""
        return self._through(rows, layers, None, change)[0]

    def normed(self, h: Tensor) -> Tensor:
        """What the head multiplies, of the stream after the last layer."""
        return self._normed(h, -1, "final_norm", AS_IS)

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """Of a layer, by name: qkv, o, gate_up, down, norms and biases."""
        return self._layers[layer]

    def _through(
        self, rows: Rows, layers: range, stored: Sequence[Stored] | None, change: Change
    ) -> tuple[Tensor, list[Stored]]:
        h, made = rows.h_BTD, list[Stored]()
        if self.positions_PD is not None and layers.start == 0:
            h = h + self.positions_PD[rows.positions_BT]
        ropes = self.description.ropes
        rotations = {rope: self._rotation(rope, rows.positions_BT) for rope in ropes}
        masks = self._masks(rows)
        for i in layers:
            layer, past = self.description.layers[i], None if stored is None else stored[i]
            sight = rotations[layer.rope], masks[layer.window]
            of, x = change.source(i), self._norm(h, i, "attn_norm", change)
            shared = None if of is None else made[of]
            out, new = self._attention(x, i, sight, (past, shared), change)
            made.append(new)
            h = h + self._post(out, i, "attn_post_norm")
            x = x if self.description.parallel else self._norm(h, i, "ffn_norm", change)
            h = self.added(h, change.ffn(x, h, i, partial(self._dense, x, i, change)), i)
        return h, made

    def added(self, h: Tensor, out: Tensor, layer: int) -> Tensor:
        """The stream with what a layer's feed-forward gave."""
        return h + self._post(out, layer, "ffn_post_norm")

    def logits(self, x: Tensor) -> Tensor:
        """(..., V) of normed states."""
        return linear(x.to(self.dtype), self.head_VD)

    def _masks(self, rows: Rows) -> dict[int | None, Tensor]:
        """(B, 1, T, S) bool for each reach of attention. Stored rows are at positions 0, 1, ..."""
        allow, positions_BT = rows.allow_BTS, rows.positions_BT.int()
        windows = {layer.window for layer in self.description.layers}
        out: dict[int | None, Tensor] = {None: allow[:, None]} if None in windows else {}
        if widths := [w for w in windows if w is not None]:
            count = allow.shape[2] - positions_BT.shape[1]
            before = torch.arange(count, dtype=torch.int32, device=self.device)
            keys_BS = torch.cat([before.expand(len(positions_BT), -1), positions_BT], dim=1)
            apart = positions_BT[:, :, None] - keys_BS[:, None]
            out |= {w: (allow & (apart < w))[:, None] for w in widths}
        return out

    def _rotation(self, rope: Rope, positions_BT: Tensor) -> Tensor:
        known = self._cos_sin.get(rope)
        need = int(positions_BT.max()) + 1
        if known is None or len(known) < need:
            made = cos_sin(rope, self.description.head_dim, torch.arange(2 * need))[:, 0]
            self._cos_sin[rope] = known = torch.view_as_real(made).to(self.device, self.residual)
        return known[positions_BT][:, :, None]  # (B, T, 1, E/2, 2)

    def _norm(self, h: Tensor, layer: int, name: str, change: Change) -> Tensor:
        return self._normed(h, layer, name, change).to(self.dtype)

    def _normed(self, h: Tensor, layer: int, name: str, change: Change = AS_IS) -> Tensor:
        """Layer -1 is what comes after all."""
        weights, eps = self._layers[layer], self.description.norm_eps
        weight = change.vector(weights[name], layer, name)
        if self.description.layer_norm:
            return layer_norm(h, h.shape[-1:], weight, weights[f"{name}_bias"], eps)
        return rms_norm(h, h.shape[-1:], weight, eps)

    def _post(self, out: Tensor, layer: int, name: str) -> Tensor:
        out = out.to(self.residual)
        if not self.description.post_norm:
            return out
        weight = self._layers[layer][name]
        return rms_norm(out, out.shape[-1:], weight, self.description.norm_eps)

    def _linear(
        self, x: Tensor, layer: int, name: str, parts: Sequence[str], change: Change
    ) -> Tensor:
        y = linear(x, change.weight(self._layers[layer][name], x, layer, name))
        return change.add(y, x, layer, parts)

    def _attention(
        self,
        x: Tensor,
        i: int,
        sight: tuple[Tensor, Tensor],
        known: tuple[Stored | None, Stored | None],
        change: Change,
    ) -> tuple[Tensor, Stored]:
        """`sight`: rotations, and which keys each row may see; `known`: keys and values that were stored
        before, and those of another layer that are used in place of new ones."""
        d, weights, (turn, mask), (past, shared) = self.description, self._layers[i], sight, known
        q, new = self._projected(x, i, turn, shared, change)
        keys, values = new if past is None else joined(past, new)
        group = d.num_heads // d.num_kv_heads
        keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
        with sdpa_kernel(ATTENTION):
            out = scaled_dot_product_attention(q, keys, values, mask, scale=d.attn_scale)
        out = out.transpose(1, 2).flatten(2)
        out = self._linear(out, i, "o", ("o",), change)
        return out + weights["o_bias"] if d.o_bias else out, new

    def _projected(
        self, x: Tensor, i: int, turn: Tensor, shared: Stored | None, change: Change
    ) -> tuple[Tensor, Stored]:
        """Queries (B, H, T, E), rotated; and new keys and values, or those that are shared."""
        d, weights = self.description, self._layers[i]
        names = ("q", "k", "v") if shared is None else ("q",)
        rows = d.num_heads * d.head_dim if shared is not None else d.qkv_rows
        w = change.weight(weights["qkv"], x, i, "qkv")[:rows]
        qkv = change.add(linear(x, w), x, i, names)
        if d.qkv_bias:
            qkv = qkv + weights["qkv_bias"][:rows]
        heads = qkv.unflatten(-1, (-1, d.head_dim)).to(self.residual)
        q = heads[:, :, : d.num_heads]
        if d.qk_norm:
            q = rms_norm(q, q.shape[-1:], weights["q_norm"], d.norm_eps)
        q = _rotate(q, turn).transpose(1, 2).to(self.dtype)
        if shared is not None:
            return q, shared
        k, v = heads[:, :, d.num_heads :].chunk(2, dim=2)
        if d.qk_norm:
            k = rms_norm(k, k.shape[-1:], weights["k_norm"], d.norm_eps)
        k, v = (t.transpose(1, 2).to(self.dtype) for t in (_rotate(k, turn), v))
        return q, (k, v)

    def _dense(self, x: Tensor, i: int, change: Change) -> Tensor:
        d, weights = self.description, self._layers[i]
        both = self._linear(x, i, "gate_up", ("up",) if d.two_matrix else ("gate", "up"), change)
        if d.mlp_bias:
            both = (both + weights["gate_up_bias"]).to(self.dtype)
        down = self._linear(change.inner(both, d), i, "down", ("down",), change)
        return down + weights["down_bias"] if d.mlp_bias else down


def joined(past: Stored, new: Stored) -> Stored:
    """Stored keys and values, then new ones."""
    return torch.cat([past[0], new[0]], dim=2), torch.cat([past[1], new[1]], dim=2)


def _rotate(heads: Tensor, turn: Tensor) -> Tensor:
    """Adjacent pairs."""
    a, b = heads.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
