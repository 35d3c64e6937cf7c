"""A buffer pool to read records into: page-aligned memory, in huge pages where the system has them.

Huge pages are what makes direct reads fast: a device is handed a few long runs of memory instead of
hundreds of single pages (docs/decisions.md: 2.3 to 3.0 GB/s against 1.0 to 1.6 on one virtual disk).
"""

from __future__ import annotations

import contextlib
import mmap
import sys

import torch
from torch import Tensor

from outsize.storage.file import PAGE

HUGE, SMALL = 2 << 20, 1 << 20  # a huge page; what is smaller than SMALL is not worth one
# Python's default for unnamed maps is shared, which is accounted as cache that cannot be dropped.
_PRIVATE = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_NO_ADVICE: int = getattr(mmap, "MADV_NOHUGEPAGE", 0)
_COLLAPSE = 25  # Linux 6.1's MADV_COLLAPSE, which Python does not name yet
_DROP: int | None = getattr(mmap, "MADV_DONTNEED", None)


def huge_bytes(size: int) -> int:
    """Bytes of memory that a pool of `size` bytes takes: whole huge pages, where it has any."""
    return -(-size // HUGE) * HUGE if size >= SMALL else size


class BufferPool:
    """`count` equal buffers side by side. Memory is taken when a buffer is first written."""

    def __init__(self, count: int, size: int) -> None:
        is_large = count * size >= SMALL and _ADVICE is not None
        total = huge_bytes(count * size) if is_large else max(count * size, PAGE)
        self._map, self._whole, self._start = _taken(total, is_large)
        if is_large and _ADVICE is not None:
            self._map.madvise(_ADVICE)
        self._view, self._size = memoryview(self._map), size
        self._count, self._is_large = count, is_large

    def __getitem__(self, index: int) -> tuple[Tensor, memoryview]:
        """A buffer as a tensor of bytes, and as a memoryview to read into."""
        start = self._start + index * self._size
        return self._whole[start : start + self._size], self.view(index)

    def view(self, index: int, count: int = 1) -> memoryview:
        """So many buffers side by side, to read into."""
        start = self._start + index * self._size
        return self._view[start : start + count * self._size]

    def rows(self) -> Tensor:
        """(count, size) bytes: all buffers."""
        size = self._count * self._size
        return self._whole[self._start : self._start + size].view(self._count, self._size)

    def populate(self) -> None:
        """Take all memory now, in huge pages even if the system must first make room for them: under a
        memory cap it would else silently fall back to single pages."""
        used = huge_bytes(self._count * self._size)
        self._whole[self._start : self._start + used].zero_()
        if self._is_large:
            _collapse(self._map, self._start, used)

    def drop(self, index: int) -> None:
        """Return a buffer's memory to the system; its content is lost."""
        if _DROP is not None:
            self._map.madvise(_DROP, self._start + index * self._size, self._size)


def _taken(size: int, is_large: bool) -> tuple[mmap.mmap, Tensor, int]:
    """A map, all its bytes, and where in them `size` bytes begin: on a huge page, if they are many."""
    taken = mmap.mmap(-1, size + HUGE if is_large else size, **_PRIVATE)
    every = torch.frombuffer(taken, dtype=torch.uint8)
    return taken, every, -every.data_ptr() % HUGE if is_large else 0


def _collapse(taken: mmap.mmap, start: int, size: int) -> None:
    """Into huge pages, what may be in single ones."""
    with contextlib.suppress(OSError):  # an older kernel, or no huge page to be had
        taken.madvise(_COLLAPSE, start, size)


def whole(size: int) -> Tensor:
    """(size,) bytes of zeros for one large matrix: in huge pages, which multiplying reads up to half as fast
    again, but for an end that would not fill one. Takes `size` bytes, and no more."""
    full = size // HUGE * HUGE
    if full == 0 or _ADVICE is None:
        return torch.zeros(size, dtype=torch.uint8, device="cpu")
    taken, every, start = _taken(size, True)
    with contextlib.suppress(OSError):  # a system without huge pages
        taken.madvise(_ADVICE, start, full)
        taken.madvise(_NO_ADVICE, start + full, size + HUGE - start - full)
    made = every[start : start + size].zero_()
    _collapse(taken, start, full)
    return made


def buffer(size: int) -> tuple[Tensor, memoryview]:
    """One buffer. Its memory returns to the system when the tensor goes."""
    return BufferPool(1, size)[0]
