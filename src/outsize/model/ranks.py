"""What a model that several ranks share is run with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from outsize.model.paged import PagedLayer
from outsize.model.step import Step
from outsize.parallel.transport import Wire

Chunk = tuple[Tensor, Step]  # rows of the residual stream, and their step
Wanted = Sequence[Sequence[slice]]  # of each chunk, rows of it whose logits are wanted


class Leader(Protocol):
    """Of several ranks, what tells the others of a step (forward/lead.py)."""

    @property
    def wire(self) -> Wire:
        """What this rank has sent and received."""
        ...

    def step(self, pairs: Sequence[Any], /) -> AbstractContextManager[None]:
        """Around a step of these spans, each with its cache."""
        ...


class Stages(Protocol):
    """Of several ranks that have some layers each, this one's place (forward/relay.py)."""

    @property
    def begins(self) -> bool:
        """Does it look embeddings up?"""
        ...

    def run(self, layers: Sequence[PagedLayer], chunks: Sequence[Chunk], wanted: Wanted, /) -> None:
        """All chunks through this rank's layers and the others'. Changes the residual streams; rows that are
        not `wanted` need not be whole."""
        ...
