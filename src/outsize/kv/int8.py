"""A KV cache that keeps each key and value in 8 bits: half the memory. Lossy.

An entry (one head's key or value of one token, E numbers) is E codes of -127 to 127, and for each 32 of them
(for all, where 32 do not divide E) a step, in bf16: the largest number over 127. Attention reads the numbers
that the codes stand for, those of the very step that makes them too, so that an answer does not depend on
where steps begin. One layer at a time is decoded, into memory that all layers share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outsize.kv.kv import KV

GROUP, MOST = 32, 127
Decode = Callable[[Tensor, Tensor, int], None]


class Int8KV(KV):
    """As KV; its entries are stored as (C, capacity, bytes)."""

    def __init__(self, like: KV, decode: Decode, room: int = 0) -> None:
        """`like`: an empty cache of the numbers that attention reads. `decode`: backend's."""
        states = {layer: state.emptied() for layer, state in like.states.items()}
        coded = [(heads, entry_bytes(head_dim)) for heads, head_dim in like.sizes]
        others = {layer: size for layer, size in enumerate(coded) if size != coded[0]}
        super().__init__(len(coded), coded[0], torch.uint8, room, states, others)
        self._like, self._decode, self._dtype = like, decode, like.like.dtype
        self._of = like.sizes
        # Of each size that layers have, what is decoded last.
        self._numbers = {
            (heads, head_dim): like.like.new_empty(2 * heads, 0, head_dim)
            for heads, head_dim in self._of
        }

    def append(self, layer: int, k_TJE: Tensor, v_TJE: Tensor, positions: Sequence[int]) -> Tensor:
        coded, slots = self.place(layer, positions)
        index = torch.tensor(slots, dtype=torch.int64, device="cpu")
        entries_CTE = torch.cat([k_TJE, v_TJE], dim=1).transpose(0, 1).to(self._dtype)
        coded[:, index] = encode(entries_CTE)
        return self.view(layer)

    def opened(
        self, layer: int, positions: Sequence[int], beyond: int = 0
    ) -> tuple[Tensor, range | tuple[int, ...], Tensor | None]:
        coded, slots = self.place(layer, positions, beyond)
        return self._decoded(layer, beyond), slots, coded

    def looked_at(self, layer: int, beyond: int) -> tuple[Tensor, Tensor | None]:
        coded, _ = self.reserve(layer, (), beyond)
        return self._decoded(layer, beyond), coded

    def view(self, layer: int) -> Tensor:
        """Valid until any layer is looked at again."""
        return self._decoded(layer)[:, : len(self.positions[layer])]

    def emptied(self) -> KV:
        return Int8KV(self._like, self._decode)

    def _decoded(self, layer: int, beyond: int = 0) -> Tensor:
        count, numbers_CSE = len(self.positions[layer]), self._numbers[self._of[layer]]
        num_heads, capacity, head_dim = numbers_CSE.shape
        if capacity < count + beyond:
            size = max(count + beyond, self._stored[layer].shape[1])
            numbers_CSE = numbers_CSE.new_empty(num_heads, size, head_dim)
            self._numbers[self._of[layer]] = numbers_CSE
        self._decode(self._stored[layer], numbers_CSE, count)
        return numbers_CSE


def group_of(head_dim: int) -> int:
    """Numbers that share a step."""
    return head_dim if head_dim % GROUP else GROUP


def entry_bytes(head_dim: int) -> int:
    return head_dim + 2 * head_dim // group_of(head_dim)


def encode(entries_CTE: Tensor) -> Tensor:
    """(C, T, bytes): codes, and their steps."""
    x = entries_CTE.float().unflatten(-1, (-1, group_of(entries_CTE.shape[-1])))
    kept = (x.abs().amax(dim=-1, keepdim=True) / MOST).bfloat16()
    step = kept.float()
    codes = torch.where(step > 0, (x / step).round().clamp(-MOST, MOST), 0.0).to(torch.int8)
    return torch.cat([codes.flatten(-2).view(torch.uint8), kept.flatten(-2).view(torch.uint8)], -1)


def decode(coded_CSX: Tensor, out_CSE: Tensor, count: int) -> None:
    """The numbers of the first `count` entries: the plain twin of kernels/csrc/attend.c."""
    head_dim = out_CSE.shape[2]
    some = coded_CSX[:, :count]
    step = some[..., head_dim:].contiguous().view(torch.bfloat16).float()
    codes = some[..., :head_dim].contiguous().view(torch.int8).float()
    numbers = codes.unflatten(-1, (-1, group_of(head_dim))) * step[..., None]
    out_CSE[:, :count] = numbers.flatten(-2)
