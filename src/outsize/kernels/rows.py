"""The rows of one step: whose they are, at which positions, and which entries of a cache each may see.

A step is a ragged batch: rows of several sequences, each with its own cache of keys and values. A row is a
token, or a mask token of a draft, which stands after a token (its anchor) and is never seen by others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from outsize.kernels.structs import AttentionSpan, AttentionTable
from outsize.kv.kv import KV


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one sequence in a step: its tokens; then, block by block, `depth` mask tokens after each of
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
        """Mask tokens stand at the positions after their anchors."""
        masks = [self.positions[a] + j + 1 for a in self.anchors for j in range(self.depth)]
        return [*self.positions, *masks]

    def spans(self, start: int, window: int | None) -> list[AttentionSpan]:
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
class Rows:
    """The rows of a step, sequence by sequence. `wide`: a chunk of one long span, computed as matmuls; else a
    few rows, each computed as if alone."""

    segments: Sequence[Segment]
    wide: bool
    _tables: dict[object, AttentionTable] = field(default_factory=dict)

    def table(self, layer: int, window: int | None) -> AttentionTable:
        """What each row sees in a layer, with room made for its entry. Layers alike share it."""
        found = [s.kv.reserve(layer, s.positions, s.num_masks) for s in self.segments]
        key = window, *(start for _, start in found)
        if key not in self._tables:
            pairs = zip(self.segments, found, strict=True)
            self._tables[key] = AttentionTable([s.spans(start, window) for s, (_, start) in pairs])
        table = self._tables[key]
        for number, (stored, _) in enumerate(found):
            table.store(number, stored)
        return table
