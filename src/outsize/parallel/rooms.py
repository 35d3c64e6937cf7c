"""Tensors as bytes, and memory for what comes: shared by the collectives."""

from __future__ import annotations

import torch
from torch import Tensor

from outsize.parallel.transport import Buffer

KEPT = 256 << 10  # bytes: as large as a step's messages get; a long span's memory is given back


def as_bytes(x: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied; the view keeps it alive."""
    return x.view(-1).view(torch.uint8).numpy().data


class Inbox:
    """Memory for one message of each other rank: tensors, and the same as bytes."""

    def __init__(self, shapes: dict[int, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.tensors = {r: torch.empty(s, dtype=dtype, device="cpu") for r, s in shapes.items()}
        self.buffers: dict[int, Buffer] = {r: as_bytes(t) for r, t in self.tensors.items()}


class Rooms:
    """Inboxes by what they are for. Those of steps are kept: what came is valid until the next call."""

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.dtype, tuple[tuple[int, tuple[int, ...]], ...]], Inbox] = {}

    def inbox(self, shapes: dict[int, tuple[int, ...]], dtype: torch.dtype) -> Inbox:
        """`shapes`: of each other rank's message."""
        key = dtype, tuple(shapes.items())
        if (found := self._kept.get(key)) is None:
            found = Inbox(shapes, dtype)
            if sum(map(len, found.buffers.values())) <= KEPT:
                self._kept[key] = found
        return found
