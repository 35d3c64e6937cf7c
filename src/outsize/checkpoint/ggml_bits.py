"""How small numbers lie in the bytes of a GGUF block.

Shapes: B blocks.
"""

from __future__ import annotations

import numpy as np

from outsize.checkpoint.coded import Bytes, Floats


def half(blocks: Bytes, at: int) -> Floats:
    """The fp16 at byte `at` of every block, as fp32 (B, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def planes(packed: Bytes, run: int, bits: int) -> Bytes:
    """(B, n) bytes -> (B, n * 8 / bits) numbers of `bits` bits. Of each `run` bytes first the lowest bits of
    all, then the next ones; so with runs of one byte, numbers in order from its lowest bits on."""
    if (run, bits) == (1, 1):
        return np.unpackbits(packed, axis=1, bitorder="little")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    out = packed.reshape(len(packed), -1, 1, run) >> shifts
    out &= np.uint8((1 << bits) - 1)
    return out.reshape(len(packed), -1)


def with_high(low: Bytes, high: Bytes, place: int) -> Bytes:
    """`high` put above the `place` bits of `low`, in its memory."""
    low |= np.left_shift(high, np.uint8(place), out=high)
    return low
