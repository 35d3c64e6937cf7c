"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464) in torch: how tokens change the numbers that a
sequence keeps, and what they read there.

Each value head keeps a matrix S (numbers of a key x of a value). A token's step is: S fades by the token's
decay; what S holds under the token's key moves towards the token's value, by a share of the difference; and
the query reads S. Queries, keys and values are each a mean of the last tokens', weighed by channel (a causal
convolution), keys and queries of length one.

Few rows change S one by one (`delta_rows`; compiled: csrc/delta.c), so that a row's bits do not depend on its
company. Of many, a block of tokens is one system of equations (`delta_span`).

Shapes: T tokens, C channels (queries, keys, values), H value heads, K and V numbers of a key and a value, P
tokens: those before that the mean needs, and T.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import silu

from outsize.kernels.structs import Delta as DeltaStruct
from outsize.kernels.structs import address
from outsize.model_parts import Delta

EPS = 1e-6  # of the lengths of keys and queries, whatever the config says of norms (transformers' class)
BLOCK = 64  # tokens of a long span that make one system


@dataclass(frozen=True)
class DeltaSpec:
    """One layer's, for any backend: sizes, and the weights of the convolution (kernel, C) fp32."""

    sizes: Delta
    conv: Tensor
    key_of_H: Tensor = field(init=False)  # the key head of each value head
    struct: DeltaStruct = field(init=False)
    pointer: int = field(init=False)

    def __post_init__(self) -> None:
        x = self.sizes
        heads = torch.arange(x.value_heads, dtype=torch.int64, device="cpu")
        each = x.value_heads // x.key_heads
        key_of_H = heads % x.key_heads if x.is_tiled else heads // each
        conv = address(self.conv, torch.float32)
        struct = DeltaStruct(x.key_heads, x.value_heads, x.key, x.value, x.kernel, x.is_tiled, conv)
        object.__setattr__(self, "key_of_H", key_of_H)
        object.__setattr__(self, "struct", struct)
        object.__setattr__(self, "pointer", ctypes.addressof(struct))


def delta_rows(spec: DeltaSpec, now_HKV: Tensor, window_PC: Tensor, gates_TG: Tensor) -> Tensor:
    """(T, H, V) fp32: one token after the other, each as if alone. Changes `now`. Gates: logarithms of
    decays, then shares of the difference."""
    width, out = spec.sizes.kernel, list[Tensor]()
    for t, gates in enumerate(gates_TG):
        q_1HK, k_1HK, v_1HV = _heads(spec, _mixed(spec, window_PC[t : t + width]))
        log_H, share_H = gates.chunk(2)
        now_HKV.mul_(log_H.exp()[:, None, None])
        found_H1V = torch.bmm(k_1HK.transpose(0, 1), now_HKV)
        change_H1V = (v_1HV.transpose(0, 1) - found_H1V).mul_(share_H[:, None, None])
        now_HKV.baddbmm_(k_1HK[0, :, :, None], change_H1V)
        out.append(torch.bmm(q_1HK.transpose(0, 1), now_HKV).transpose(0, 1))
    return torch.cat(out)


def delta_span(spec: DeltaSpec, now_HKV: Tensor, window_PC: Tensor, gates_TG: Tensor) -> Tensor:
    """The same of many tokens, block by block. Changes `now`."""
    width, out = spec.sizes.kernel, list[Tensor]()
    for start in range(0, len(gates_TG), BLOCK):
        gates = gates_TG[start : start + BLOCK]
        mixed_TC = _mixed(spec, window_PC[start : start + len(gates) + width - 1])
        q, k, v = (x.transpose(0, 1).contiguous() for x in _heads(spec, mixed_TC))
        log_HT, share_HT = gates.T.contiguous().chunk(2)
        out.append(_block(now_HKV, (q, k, v), log_HT, share_HT).transpose(0, 1))
    return torch.cat(out)


def _mixed(spec: DeltaSpec, window_PC: Tensor) -> Tensor:
    """(T, C) fp32: each channel a mean of the last tokens', activated."""
    width, rows = spec.sizes.kernel, window_PC.float()
    count = len(rows) - width + 1
    out_TC = rows[:count] * spec.conv[0]
    for i in range(1, width):
        out_TC.addcmul_(rows[i : i + count], spec.conv[i])
    return silu(out_TC)


def _heads(spec: DeltaSpec, mixed_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys (T, H, K), for each value head, and values (T, H, V)."""
    x, count = spec.sizes, len(mixed_TC)
    q, k, v = mixed_TC.split([x.keys, x.keys, x.values], dim=1)
    q, k = (_unit(y.reshape(count, x.key_heads, x.key)) for y in (q, k))
    q = q * x.key**-0.5
    return q[:, spec.key_of_H], k[:, spec.key_of_H], v.reshape(count, -1, x.value)


def _unit(x: Tensor) -> Tensor:
    """Of length one."""
    return x * (x.square().sum(dim=-1, keepdim=True) + EPS).rsqrt()


def _block(
    s_HKV: Tensor, qkv: tuple[Tensor, Tensor, Tensor], log_HT: Tensor, share_HT: Tensor
) -> Tensor:
    """(H, T, V) of a block of tokens, whose changes of S are those of one by one: a token's change is what
    its key finds in S, in which those before it are. Changes S. `log_HT`: of the decays."""
    q_HTK, k_HTK, v_HTV = qkv
    total_HT = log_HT.cumsum(1)
    # Decay from token j to token i; nothing from later ones.
    past_HTT = (total_HT[:, :, None] - total_HT[:, None]).tril().exp().tril()
    shared_HTK = k_HTK * share_HT[..., None]
    system_HTT = torch.bmm(shared_HTK, k_HTK.transpose(1, 2)).mul_(past_HTT)
    faded_HT1 = total_HT.exp()[..., None]
    found_HTV = torch.bmm(shared_HTK * faded_HT1, s_HKV)
    wanted_HTV = v_HTV * share_HT[..., None] - found_HTV
    change_HTV = torch.linalg.solve_triangular(
        system_HTT, wanted_HTV, upper=False, unitriangular=True
    )
    own_HTT = torch.bmm(q_HTK, k_HTK.transpose(1, 2)).mul_(past_HTT)
    out_HTV = torch.bmm(q_HTK * faded_HT1, s_HKV).baddbmm_(own_HTT, change_HTV)
    left_HT1 = (total_HT[:, -1:] - total_HT).exp()[..., None]
    s_HKV.mul_(total_HT[:, -1].exp()[:, None, None])
    s_HKV.baddbmm_((k_HTK * left_HT1).transpose(1, 2), change_HTV)
    return out_HTV
