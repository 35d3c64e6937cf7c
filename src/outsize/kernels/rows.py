"""The rows of one step: whose they are, at which positions, and which entries of a cache each may see.

A step is a ragged batch: rows of several sequences, each with its own cache of keys and values. A row is a
token, or a mask token of a draft, which stands after a token (its anchor) and is never seen by others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from outsize.kernels.structs import AttentionSpan, AttentionTable
from outsize.kv.kv import KV


class Sight(NamedTuple):
    """What a row sees of what was before it: the last `window` positions, itself among them (None: all); or,
    `chunked`, those of its own piece of so many."""

    window: int | None = None
    chunked: bool = False

    def least(self, position: int) -> int:
        """The first position that a row at a position may see."""
        if self.window is None:
            return 0
        start = (
            position // self.window * self.window if self.chunked else position + 1 - self.window
        )
        return max(0, start)

    def first(self, kept: Sequence[int], position: int) -> int:
        """The first of the entries at rising positions that a row at a position sees."""
        return 0 if self.window is None else bisect_left(kept, self.least(position))


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one sequence in a step: its tokens, by rising position; then, block by block, `depth` mask
    tokens after each of the tokens with the numbers `anchors`."""

    kv: KV
    positions: Sequence[int]
    anchors: tuple[int, ...] = ()
    depth: int = 0

    @property
    def num_masks(self) -> int:
        return len(self.anchors) * self.depth

    @property
    def length(self) -> int:
        return len(self.positions) + self.num_masks

    def all_positions(self) -> list[int]:
        """Mask tokens stand at the positions after their anchors."""
        masks = [self.positions[a] + j + 1 for a in self.anchors for j in range(self.depth)]
        return [*self.positions, *masks]

    def spans(self, layer: int, slots: Sequence[int], sight: Sight) -> list[AttentionSpan]:
        """What each row sees in a layer, whose entries of tokens are at `slots`; masks' go behind all."""
        kept, out = self.kv.positions[layer], []
        for slot in slots:
            first = sight.first(kept, kept[slot])
            out.append(AttentionSpan(slot, first, slot + 1, slot + 1))
        block = len(kept)
        for a in self.anchors:
            seen = slots[a] + 1
            for j in range(self.depth):
                first = sight.first(kept, self.positions[a] + j + 1)
                out.append(AttentionSpan(block + j, min(seen - 1, first), seen, block))
            block += self.depth
        return out

    def reads(self, layer: int, sight: Sight) -> list[AttentionSpan]:
        """What each token sees in a layer whose entries are there; kernels' own entries go behind them."""
        kept, out = self.kv.positions[layer], []
        for row, position in enumerate(self.positions):
            seen, behind = bisect_left(kept, position) + 1, len(kept) + row
            out.append(AttentionSpan(behind, sight.first(kept, position), seen, behind + 1))
        return out


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a step, sequence by sequence. `wide`: a chunk of one long span, computed as matmuls; else a
    few rows, each computed as if alone."""

    segments: Sequence[Segment]
    wide: bool
    _tables: dict[object, AttentionTable] = field(default_factory=dict)

    def all_positions(self) -> list[int]:
        """Of every row, in order."""
        return [p for s in self.segments for p in s.all_positions()]

    def table(self, layer: int, sight: Sight, stores: bool = True) -> AttentionTable:
        """What each row sees in a layer, with room made for its entry. Layers alike share it."""
        if not stores:
            return self._reading(layer, sight)
        found = [s.kv.opened(layer, s.positions, s.num_masks) for s in self.segments]
        key = sight, *(slots for _, slots, _ in found)
        if key not in self._tables:
            pairs = zip(self.segments, found, strict=True)
            self._tables[key] = AttentionTable(
                [s.spans(layer, slots, sight) for s, (_, slots, _) in pairs]
            )
        table = self._tables[key]
        for number, (stored, _, coded) in enumerate(found):
            table.store(number, stored, coded)
        return table

    def _reading(self, layer: int, sight: Sight) -> AttentionTable:
        """The same over entries that are there. What kernels store goes behind them, and is not kept."""
        found = [s.kv.looked_at(layer, s.length) for s in self.segments]
        key = "reads", sight, *(tuple(s.kv.positions[layer]) for s in self.segments)
        if key not in self._tables:
            self._tables[key] = AttentionTable([s.reads(layer, sight) for s in self.segments])
        table = self._tables[key]
        for number, (stored, coded) in enumerate(found):
            table.store(number, stored, coded)
        return table
