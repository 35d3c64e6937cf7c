"""What a sequence asks of one step (a span of tokens), and what it is sent back (logits)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outsize.forward.prune import Prune
from outsize.kernels.rows import Segment
from outsize.model.lora import Adapter
from outsize.model.width import Width

NO_STATES = torch.empty(0, 0, dtype=torch.float32, device="cpu")
NARROW = 16  # tokens: the longest span that runs row by row


@dataclass(frozen=True, slots=True)
class MaskTokens:
    """Mask tokens of a multi-token draft, a block of them after some tokens of a span (its anchors): they see
    what their anchor sees and their own block so far, and nothing ever sees them."""

    anchors: tuple[int, ...]  # numbers of tokens in the span
    rows_KD: Tensor  # fp32: what the masks of a block are
    adapter: Adapter  # acts on them alone


@dataclass(frozen=True, slots=True)
class Span:
    """Run these tokens from position `start` on (the cache forgets whatever was there), and give the
    logits of the last `want` of them."""

    start: int
    tokens: Sequence[int]
    want: int = 1
    masks: MaskTokens | None = None
    adapter: Adapter | None = None
    prune: Prune | None = None  # tokens that may skip layers: lossy
    width: Width | None = None  # of nested experts' feed-forwards: lossy; None: whole

    @property
    def is_narrow(self) -> bool:
        """Is each of its rows computed as if alone? A drafting step's always are."""
        return len(self.tokens) <= NARROW or self.masks is not None

    @property
    def is_lazy(self) -> bool:
        """Does this step prune or revive? Only one that revives does so once the prompt is done."""
        return self.prune is not None and (not self.is_narrow or self.prune.mode == "revive")

    @property
    def positions(self) -> range:
        return range(self.start, self.start + len(self.tokens))

    @property
    def num_masks(self) -> int:
        return 0 if self.masks is None else len(self.masks.anchors) * len(self.masks.rows_KD)

    @property
    def num_rows(self) -> int:
        return len(self.tokens) + self.num_masks


@dataclass(frozen=True, slots=True)
class Out:
    """Logits of the last K tokens of a span: (K, V) fp32; normed states of its masks, (M, D) fp32; and those
    that its logits were made of, (K, D) fp32."""

    logits_KV: Tensor
    masks_MD: Tensor | None = None
    states_KD: Tensor = NO_STATES


def widths(segments: Sequence[Segment], spans: Sequence[Span]) -> Iterator[tuple[slice, Width]]:
    """Which rows of a step run at a width of their own: all of a span's, its mask tokens' too."""
    at = 0
    for segment, span in zip(segments, spans, strict=True):
        if span.width is not None:
            yield slice(at, at + segment.length), span.width
        at += segment.length
