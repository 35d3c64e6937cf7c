"""Blocks of prompts in memory, by name; the least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

from torch import Tensor


class MemoryBlocks:
    """Keys and values of `chunk` tokens each: (L layers, C, chunk, E)."""

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()  # the latest used last

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def tokens(self) -> int:
        return len(self._blocks) * self._chunk

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self._blocks.values())

    def get(self, key: bytes) -> Tensor | None:
        return self._blocks.get(key)

    def put(self, key: bytes, block: Tensor) -> None:
        self._blocks[key] = block

    def touch(self, keys: Iterable[bytes]) -> None:
        """They were used now. A prompt's later blocks are of no use without its first, which stay longest."""
        for key in reversed(list(keys)):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def take(self, key: bytes) -> Tensor | None:
        """A block, no longer kept."""
        return self._blocks.pop(key, None)

    def forget(self, spare: Collection[bytes] = ()) -> bool:
        """Let go of the least recently used block that is not in `spare`; False: there is none."""
        for key in self._blocks:
            if key not in spare:
                del self._blocks[key]
                return True
        return False

    def clear(self) -> None:
        self._blocks.clear()
