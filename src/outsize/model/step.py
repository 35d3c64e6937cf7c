"""What the parts of a model need to know of a step: whose rows, at which positions, how wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from outsize.cache.kv import KV
from outsize.family.description import Rope
from outsize.native.kernels import Kernels


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one sequence in a step."""

    kv: KV
    positions: range

    @property
    def length(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class Step:
    """What the blocks need to know of a step: whose rows, at which positions, how wide."""

    segments: Sequence[Segment]
    turns: Mapping[Rope, Tensor]
    wide: bool
    kernels: Kernels | None  # None: the plain path
