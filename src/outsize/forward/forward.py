"""What runs a step of a model: the seam between the loop that decodes (engine/) and the blocks (model/)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from outsize.forward.span import Out, Span
from outsize.kv.kv import KV
from outsize.model.transformer import Transformer


class Forward(Protocol):
    """Run a ragged batch of spans, each over its own sequence's cache, to which it appends.

    Law: an exact one equals `full` (full.py), the first; a lossy one equals it at its neutral setting.
    """

    def __call__(
        self, model: Transformer, spans: Sequence[Span], kvs: Sequence[KV], /
    ) -> list[Out]: ...
