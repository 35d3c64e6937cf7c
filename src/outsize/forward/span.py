"""What a flow asks for, and what it is sent back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """Run these tokens from position `start` on (whatever was there is forgotten), and give the
    logits of the last `want`."""

    start: int
    tokens: Sequence[int]
    want: int = 1

    @property
    def positions(self) -> range:
        return range(self.start, self.start + len(self.tokens))


@dataclass(frozen=True, slots=True)
class Out:
    """Logits of the last K tokens of a span: (K, V) fp32."""

    logits_KV: Tensor
