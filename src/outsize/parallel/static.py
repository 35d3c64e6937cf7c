"""Low-bit sums by steps known beforehand (Dong et al., arXiv 2411.07942): 4 bits, and 16 for few features.

On calibration data each rank's parts are watched: for every point and feature a running least and largest
number (moving averages, of weight 0.01, begun at the first data). A feature's step on a rank is the larger of
their sizes over 7; the D / 64 features whose ranges, summed over ranks, are largest go in bf16. Steps travel
with nobody: each rank keeps all ranks' steps of all points. What is beyond a step's 7 saturates.

A row's message: the nibbles of the other features, the first half's low and the second's high, then the kept
features in bf16: 4 + 12 / 64 bits a number. Steps are of parts, not of sums: always in one step. The paper's
way, to compare kernels/turned.py with; not in C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from outsize.parallel.collective import Point

WEIGHT, SHARE, MOST = 0.01, 64, 7


@dataclass(frozen=True)
class Table:
    """A point's steps (P ranks, D) fp32 and the features that go in bf16, (K,) int64, in order."""

    step_PD: Tensor
    kept_K: Tensor

    @cached_property
    def coded(self) -> Tensor:
        """(D - K,) int64: the features that go in 4 bits."""
        width = self.step_PD.shape[1]
        rest = torch.ones(width, dtype=torch.bool, device="cpu")
        rest[self.kept_K] = False
        return rest.nonzero().flatten()


class Ranges:
    """Of one point, over all ranks: feed it each rank's parts, as they are under the real cut."""

    def __init__(self, world: int, width: int) -> None:
        shape = (world, width)
        self._least = torch.zeros(shape, dtype=torch.float32, device="cpu")
        self._largest = torch.zeros(shape, dtype=torch.float32, device="cpu")
        self._seen = [False] * world

    def see(self, rank: int, part_TD: Tensor) -> None:
        for kept, now in (
            (self._least, part_TD.float().amin(0)),
            (self._largest, part_TD.float().amax(0)),
        ):
            kept[rank] = torch.lerp(kept[rank], now, WEIGHT) if self._seen[rank] else now
        self._seen[rank] = True

    def table(self, share: int = SHARE) -> Table:
        """One feature of `share` in bf16."""
        size = torch.maximum(self._least.abs(), self._largest.abs())
        kept = size.sum(0).topk(size.shape[1] // share).indices.sort().values
        return Table(size / MOST, kept)


class Static:
    """Codec (lowbit.py) of tables by point."""

    def __init__(self, rank: int, tables: Mapping[Point, Table]) -> None:
        self._rank, self._tables = rank, tables

    def pack(self, part_TD: Tensor, at: Point) -> Tensor:
        table = self._tables[at]
        x, step = part_TD.float()[:, table.coded], table.step_PD[self._rank, table.coded]
        inverse = torch.where(step > 0, 1.0 / step, 0.0)
        code = (x * inverse).round().clamp(-MOST - 1, MOST).to(torch.int16) + MOST + 1
        if code.shape[1] % 2:
            code = torch.nn.functional.pad(code, (0, 1), value=MOST + 1)
        low, high = code.to(torch.uint8).chunk(2, dim=1)
        nibbles = low | high << 4
        if not len(table.kept_K):
            return nibbles
        kept = part_TD[:, table.kept_K].to(torch.bfloat16).contiguous()
        return torch.cat([nibbles, kept.view(torch.uint8)], dim=1)

    def sum(self, messages: Sequence[Tensor], width: int, at: Point) -> Tensor:
        table = self._tables[at]
        num = len(table.coded)
        total = torch.zeros(len(messages[0]), width, dtype=torch.float32, device="cpu")
        for rank, message in enumerate(messages):
            nibbles, kept = message.split([(num + 1) // 2, 2 * len(table.kept_K)], dim=1)
            code = torch.cat([nibbles & 15, nibbles >> 4], dim=1)[:, :num].float() - (MOST + 1)
            total[:, table.coded] += code * table.step_PD[rank, table.coded]
            if len(table.kept_K):  # a copy: at any offset, and bf16 wants an even one
                whole = kept.clone(memory_format=torch.contiguous_format)
                total[:, table.kept_K] += whole.view(torch.bfloat16).float()
        return total
