"""What the parts of a model need to know of a step: whose rows, at which positions, how wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from outsize.kernels.native import AttentionSpan, AttentionTable, Kernels
from outsize.kv.kv import KV
from outsize.model.lora import Adapter
from outsize.model_config import Rope


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one sequence in a step: its tokens; then, block by block, `depth` masks after each of
    the tokens with the numbers `anchors`."""

    kv: KV
    positions: range
    anchors: tuple[int, ...] = ()
    depth: int = 0

    @property
    def num_masks(self) -> int:
        return len(self.anchors) * self.depth

    @property
    def length(self) -> int:
        return len(self.positions) + self.num_masks

    def all_positions(self) -> list[int]:
        """Masks stand at the positions after their anchors."""
        masks = [self.positions[a] + j + 1 for a in self.anchors for j in range(self.depth)]
        return [*self.positions, *masks]

    def reaches(self, start: int, window: int | None) -> list[AttentionSpan]:
        """What each row sees, if its tokens' entries go to slots from `start` on, and masks' behind them."""
        far = window or 1 << 60
        out = []
        for slot in range(start, start + len(self.positions)):
            out.append(AttentionSpan(slot, max(0, slot + 1 - far), slot + 1, slot + 1))
        block = start + len(self.positions)
        for a in self.anchors:
            seen = start + a + 1
            for j in range(self.depth):
                first = min(seen - 1, max(0, seen + j + 1 - far))
                out.append(AttentionSpan(block + j, first, seen, block))
            block += self.depth
        return out


@dataclass(frozen=True, slots=True)
class Step:
    """What the blocks need to know of a step: whose rows, at which positions, how wide; and which rows
    have something added to their linear maps."""

    segments: Sequence[Segment]
    turns: Mapping[Rope, Tensor]
    wide: bool
    kernels: Kernels | None  # None: the plain path
    added: Sequence[tuple[slice, Adapter]] = ()
    _tables: dict[object, AttentionTable] = field(default_factory=dict)

    def table(self, layer: int, window: int | None) -> AttentionTable:
        """What each row sees in a layer, with room made for its entry. Layers alike share it."""
        found = [s.kv.reserve(layer, s.positions, s.num_masks) for s in self.segments]
        key = window, *(start for _, start in found)
        if key not in self._tables:
            pairs = zip(self.segments, found, strict=True)
            self._tables[key] = AttentionTable(
                [s.reaches(start, window) for s, (_, start) in pairs]
            )
        table = self._tables[key]
        for number, (stored, _) in enumerate(found):
            table.store(number, stored)
        return table

    def add(self, layer: int, name: str, x_TD: Tensor, y_TN: Tensor) -> Tensor:
        """y with what adapters add to this map; changed in place."""
        if not self.added:
            return y_TN
        x_TD, y_TN = x_TD.contiguous(), y_TN.contiguous()
        for rows, adapter in self.added:
            adapter.add(layer, name, x_TD, y_TN, rows, self.wide, self.kernels)
        return y_TN


def gather(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
