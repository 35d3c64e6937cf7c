"""Attention in torch: new tokens over a sequence's cache, one token at a time, or a long span at once.

One at a time, the query heads that share a key head are laid out as that head's rows, so that each key
is read once and the problem is the same whatever else is in the step: a row's bits depend on its own
query and its own past only. A long span goes to torch's fused kernel, or, for wide heads in bf16, in
blocks of queries through plain matmuls (docs/decisions.md has the figures).

Shapes: T new tokens, S stored, H query heads, J key heads, C = 2J, G = H / J, E numbers a head.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from outsize.kernels.backend import AttentionSpec
from outsize.kernels.rows import Rows, Segment, Sight
from outsize.model_config import Description

BLOCK, LEAST_BLOCK = 128, 16  # queries at once in the blocked way
SCORE_BYTES = 48 << 20  # of a block's scores, in all forms; fewer queries where they would be more
SCORE_FORMS = 12  # bytes a score takes: bf16, masked and softmaxed in fp32, bf16 again
WIDE_HEAD = 128
CHUNK = 512  # tokens of a long span that attend at once
FILLED = 64  # queries and keys at once are multiples of it, where their kernels are kept
MASK_BYTES = 6  # of one cell of a mask, in the forms that torch makes of it
SPAN_BLOCK, SPAN_ROWS, SPAN_TOKENS = (
    256,
    192,
    8,
)  # as in spans.c: BLOCK, TOGETHER, and its fewest tokens
# (queries (T, H, E), their positions, entries (2J, S, E), their positions, spec) -> (T, H*E)
SpanAttention = Callable[[Tensor, Sequence[int], Tensor, Sequence[int], AttentionSpec], Tensor]


def attend(
    spec: AttentionSpec,
    qkv: Tensor,
    cos_sin: Tensor,
    rows: Rows,
    span: SpanAttention | None = None,
) -> Tensor:
    """(T, H*E) of the projections: bias, norms, rotation, storing of keys and values, attention. `span`: runs
    long spans; None: `attend_span`."""
    dtype, num_rotated = qkv.dtype, spec.num_heads + spec.num_kv_heads
    if spec.bias is not None:
        qkv = qkv + spec.bias  # fp32
    heads = qkv.view(len(qkv), -1, spec.head_dim)
    qk = heads[:, :num_rotated].float()
    if spec.norm is not None:
        qk = spec.norm(qk)
    qk = rotate(qk, cos_sin)
    q_THE, k_TJE = qk[:, : spec.num_heads].to(dtype), qk[:, spec.num_heads :]
    v_TJE, out, at = heads[:, num_rotated:], list[Tensor](), 0
    for s in rows.segments:
        some = slice(at, at + s.length)
        wide = (span or attend_span) if rows.wide else None
        out += _segment(spec, s, (q_THE[some], k_TJE[some], v_TJE[some]), wide)
        at += s.length
    return out[0] if len(out) == 1 else torch.cat(out)


def rotate(heads_THE: Tensor, cos_sin_T1P: Tensor) -> Tensor:
    """Rotate adjacent pairs (RoPE, arXiv 2104.09864). fp32; changes its input where its layout allows."""
    pairs = torch.view_as_complex(heads_THE.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(cos_sin_T1P)).flatten(-2)


def _segment(
    spec: AttentionSpec,
    s: Segment,
    qkv: tuple[Tensor, Tensor, Tensor],
    wide: SpanAttention | None,
) -> Iterator[Tensor]:
    """One sequence's rows: its tokens, then its mask tokens."""
    (q_THE, k_TJE, v_TJE), count = qkv, len(s.positions)
    kv_CSE = (
        s.kv.append(spec.layer, k_TJE[:count], v_TJE[:count], s.positions)
        if spec.stores
        else s.kv.view(spec.layer)
    )
    if wide is not None:
        seen = s.kv.positions[spec.layer]
        yield wide(q_THE[:count], s.positions, kv_CSE, seen, spec)
        return
    kept = s.kv.positions[spec.layer]
    slots = [bisect_left(kept, position) for position in s.positions]
    spans = s.spans(spec.layer, slots, spec.sight)
    for row, span in enumerate(spans):
        seen_CSE = kv_CSE[:, span.first : span.seen]
        if row >= count:  # a mask token sees its anchor's past, then its own block so far
            own = slice(span.start - len(kept) + count, span.slot + 1 - len(kept) + count)
            own_CME = torch.cat([k_TJE[own], v_TJE[own]], dim=1).transpose(0, 1)
            seen_CSE = torch.cat([seen_CSE, own_CME.to(kv_CSE.dtype)], dim=1)
        yield attend_row(q_THE[row], seen_CSE, spec)


def attend_row(q_HE: Tensor, kv_CSE: Tensor, spec: AttentionSpec) -> Tensor:
    """(1, H*E): a row attends to all S entries; with sinks, also to nothing, which has that score."""
    num_kv, head_dim = kv_CSE.shape[0] // 2, q_HE.shape[1]
    q_1JGE = q_HE.reshape(1, num_kv, -1, head_dim)
    k_1JSE, v_1JSE = kv_CSE[None, :num_kv], kv_CSE[None, num_kv:]
    if spec.sinks is None and not spec.cap:
        return scaled_dot_product_attention(q_1JGE, k_1JSE, v_1JSE, scale=spec.scale).view(1, -1)
    score = capped((q_1JGE @ k_1JSE.transpose(-1, -2)).float() * spec.scale, spec.cap)
    if spec.sinks is not None:
        nothing = spec.sinks.view(*score.shape[:-1], 1)
        score = torch.cat([score, nothing], dim=-1)
    share = score.softmax(-1)[..., : kv_CSE.shape[1]]
    return (share.to(v_1JSE.dtype) @ v_1JSE).view(1, -1)


def capped(score: Tensor, cap: float) -> Tensor:
    """Scores x as cap * tanh(x / cap) (Gemma 2, arXiv 2408.00118); as they are without a cap."""
    return (score / cap).tanh() * cap if cap else score


def attend_span(
    q_THE: Tensor,
    queries_T: Sequence[int],
    kv_CSE: Tensor,
    keys_S: Sequence[int],
    spec: AttentionSpec,
) -> Tensor:
    """(T, H*E): many rows at once, each over the entries that its position may see; theirs are among them.
    Positions of both rise."""
    num_new, _, head_dim = q_THE.shape
    (num_heads, size), sight = kv_CSE.shape[:2], spec.sight
    num_kv = num_heads // 2
    wide_bf16 = head_dim >= WIDE_HEAD and q_THE.dtype == torch.bfloat16
    if wide_bf16 or spec.sinks is not None or spec.cap:
        return _blocked(q_THE * spec.scale, queries_T, kv_CSE, keys_S, spec)
    plain = size == num_new and sight.least(keys_S[-1]) <= keys_S[0]
    mask = None if plain else _mask(queries_T, keys_S, sight)
    q_HTE = q_THE.transpose(0, 1)
    if q_THE.dtype == torch.bfloat16 and keeps_kernels():
        q_HTE, kv_CSE = _filled(q_HTE, 1), _filled(kv_CSE, 1)
        mask = None if mask is None else _filled(_filled(mask, 0), 1)
    out_HTE = scaled_dot_product_attention(
        q_HTE[None],
        kv_CSE[None, :num_kv],
        kv_CSE[None, num_kv:],
        mask,
        is_causal=plain,
        scale=spec.scale,
        enable_gqa=True,
    )
    return out_HTE[0, :, :num_new].transpose(0, 1).flatten(1)


@cache
def keeps_kernels() -> bool:
    """Does torch's fused attention keep a kernel for each size, for ever? With AMX it does: prompts of 170
    lengths took 84 MB that no plan knows; filled up to multiples of FILLED, 5 MB."""
    return bool(torch.cpu._is_amx_tile_supported())


def _filled(x: Tensor, axis: int) -> Tensor:
    """With zeros up to a multiple of FILLED along an axis: rows that are not used, keys that are not seen."""
    short = -x.shape[axis] % FILLED
    return pad(x, [*[0, 0] * (x.ndim - 1 - axis), 0, short]) if short else x


def _mask(queries: Sequence[int], keys: Sequence[int], sight: Sight) -> Tensor:
    """(T, S) bool: which entries each query may see, by their positions."""
    last_T1 = torch.tensor(queries, dtype=torch.int64, device="cpu")[:, None]
    at_S = torch.tensor(keys, dtype=torch.int64, device="cpu")
    if sight.window is None:
        return at_S <= last_T1
    least = [sight.least(position) for position in queries]
    return (at_S <= last_T1) & (
        at_S >= torch.tensor(least, dtype=torch.int64, device="cpu")[:, None]
    )


def _block(num_heads: int, size: int) -> int:
    return max(LEAST_BLOCK, min(BLOCK, SCORE_BYTES // (num_heads * size * SCORE_FORMS)))


def score_bytes(d: Description, context: int, activation_bytes: int) -> int:
    """The most that scores take while a long span attends: in torch, or, by threads, in spans.c."""
    rows = max(SPAN_ROWS, SPAN_TOKENS * d.num_heads // d.num_kv_heads)
    a_thread = 4 * (SPAN_BLOCK * d.head_dim + rows * (d.head_dim + 2))
    return max(_torch_bytes(d, context, activation_bytes), torch.get_num_threads() * a_thread)


def _torch_bytes(d: Description, context: int, activation_bytes: int) -> int:
    if (d.head_dim >= WIDE_HEAD and activation_bytes == 2) or d.sinks or d.attn_cap:
        return _block(d.num_heads, context) * d.num_heads * context * SCORE_FORMS
    return 0 if context <= CHUNK else MASK_BYTES * CHUNK * context


def _blocked(
    q_THE: Tensor,
    queries: Sequence[int],
    kv_CSE: Tensor,
    keys: Sequence[int],
    spec: AttentionSpec,
) -> Tensor:
    num_new, num_heads, head_dim = q_THE.shape
    num_kv, sight, sinks_H = kv_CSE.shape[0] // 2, spec.sight, spec.sinks
    group = num_heads // num_kv
    q_JTGE = q_THE.reshape(num_new, num_kv, group, head_dim).transpose(0, 1)
    out = torch.empty_like(q_JTGE)
    block = _block(num_heads, kv_CSE.shape[1])
    for first in range(0, num_new, block):
        last = min(first + block, num_new)
        start = sight.first(keys, queries[first])
        end = bisect_right(keys, queries[last - 1])
        k_JSE, v_JSE = kv_CSE[:num_kv, start:end], kv_CSE[num_kv:, start:end]
        rows_JRE = q_JTGE[:, first:last].reshape(num_kv, -1, head_dim)
        score = capped(torch.bmm(rows_JRE, k_JSE.transpose(1, 2)).float(), spec.cap)
        hidden = ~_mask(queries[first:last], keys[start:end], sight)
        score.view(num_kv, last - first, group, -1).masked_fill_(hidden[:, None], -torch.inf)
        if sinks_H is not None:
            sinks_JTG = sinks_H.view(num_kv, 1, group).expand(-1, last - first, -1)
            score = torch.cat([score, sinks_JTG.reshape(num_kv, -1, 1)], dim=-1)
        share = score.softmax(-1)
        mixed = torch.bmm(share[..., : k_JSE.shape[1]].to(v_JSE.dtype), v_JSE)
        out[:, first:last] = mixed.view(num_kv, last - first, group, head_dim)
    return out.transpose(0, 1).reshape(num_new, -1)
