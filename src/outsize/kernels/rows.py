"""The rows of one step: whose they are, at which positions, and which entries of a cache each may see.

A step is a ragged batch: rows of several sequences, each with its own cache of keys and values. A row is a
token, or a mask token of a draft, which stands after a token (its anchor) and is never seen by others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from outsize.kernels.structs import AttentionSpan, AttentionTable
from outsize.kv.kv import KV


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

    def spans(self, layer: int, slots: Sequence[int], window: int | None) -> list[AttentionSpan]:
        """What each row sees in a layer, whose entries of tokens are at `slots`; masks' go behind all."""
        kept, out = self.kv.positions[layer], []
        for slot in slots:
            out.append(
                AttentionSpan(slot, self._first(kept, kept[slot], window), slot + 1, slot + 1)
            )
        block = len(kept)
        for a in self.anchors:
            seen = slots[a] + 1
            for j in range(self.depth):
                first = self._first(kept, self.positions[a] + j + 1, window)
                out.append(AttentionSpan(block + j, min(seen - 1, first), seen, block))
            block += self.depth
        return out

    def _first(self, kept: Sequence[int], position: int, window: int | None) -> int:
        """The first entry that a row at a position sees."""
        return 0 if window is None else bisect_left(kept, position + 1 - window)


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

    def table(self, layer: int, window: int | None) -> AttentionTable:
        """What each row sees in a layer, with room made for its entry. Layers alike share it."""
        found = [s.kv.opened(layer, s.positions, s.num_masks) for s in self.segments]
        key = window, *(slots for _, slots, _ in found)
        if key not in self._tables:
            pairs = zip(self.segments, found, strict=True)
            self._tables[key] = AttentionTable(
                [s.spans(layer, slots, window) for s, (_, slots, _) in pairs]
            )
        table = self._tables[key]
        for number, (stored, _, coded) in enumerate(found):
            table.store(number, stored, coded)
        return table
