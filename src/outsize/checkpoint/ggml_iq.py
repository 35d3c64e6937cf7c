"""GGUF's IQ types of one to three bits: a stored number names a run of 8 or 4 magnitudes in a grid, and signs
lie apart. Here a run is spelt out, so that every weight has a code of its own.

Shapes: B blocks of 256 weights; every function takes them as (B, size) and gives a matrix of B rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from outsize.checkpoint.coded import Bytes, Coded
from outsize.checkpoint.ggml_bits import half, planes, with_high
from outsize.checkpoint.ggml_grids import grid, signs

Words = NDArray[Any]


def _words(b: Bytes, dtype: str) -> Words:
    """Bytes as little-endian whole numbers."""
    out: Words = np.ascontiguousarray(b).view(dtype)
    return out


def _fields(words: Words, bits: int) -> Words:
    """(B, n) -> (B, 4 n): the lowest four fields of each number, of 3 or 7 bits."""
    fields: Words = words[:, :, None] >> np.arange(0, 4 * bits, bits, dtype=words.dtype)
    fields &= words.dtype.type((1 << bits) - 1)
    return fields.reshape(len(words), -1)


def _above(low: Bytes, high: Words) -> Words:
    """Places in a grid of more than 256: 8 bits, and those above them."""
    return low | high.astype(np.uint16) << np.uint16(8)


def _runs(name: str, place: Words) -> Bytes:
    """(B, n) places in a grid -> (B, 256) digits."""
    return grid(name)[place].view(np.uint8)


def _odd(scale: Words) -> NDArray[np.int8]:
    """A scale s stands for 2 s + 1."""
    return (scale << 1 | 1).astype(np.int8)


def _words_of_signs(b: Bytes) -> tuple[Bytes, NDArray[np.int8]]:
    """8 numbers of 32 bits: four times 8 signs as 7 bits, and a scale in the highest 4."""
    words = _words(b, "<u4")
    return signs()[_fields(words, 7)], _odd(words >> 28)


def iq2_xxs(b: Bytes) -> Coded:
    both = b[:, 2:].reshape(-1, 8, 8)  # of 32 weights: four places, and their signs and scale
    minus, step = _words_of_signs(both[:, :, 4:].reshape(-1, 32))
    runs = _runs("IQ2_XXS", both[:, :, :4].reshape(-1, 32))
    return Coded("iq2_xxs", with_high(runs, planes(minus, 1, 1), 2), step, half(b, 0))


def iq2_xs(b: Bytes) -> Coded:
    both = _words(b[:, 2:66], "<u2")
    minus, runs = signs()[both >> 9], _runs("IQ2_XS", both & 511)
    step = _odd(planes(b[:, 66:], 1, 4))
    return Coded("iq2", with_high(runs, planes(minus, 1, 1), 2), step, half(b, 0))


def iq2_s(b: Bytes) -> Coded:
    runs = _runs("IQ2_S", _above(b[:, 2:34], planes(b[:, 66:74], 1, 2)))
    step = _odd(planes(b[:, 74:], 1, 4))
    return Coded("iq2", with_high(runs, planes(b[:, 34:66], 1, 1), 2), step, half(b, 0))


def iq3_xxs(b: Bytes) -> Coded:
    minus, step = _words_of_signs(b[:, 66:])
    runs = _runs("IQ3_XXS", b[:, 2:66])
    return Coded("iq3_xxs", with_high(runs, planes(minus, 1, 1), 3), step, half(b, 0))


def iq3_s(b: Bytes) -> Coded:
    runs = _runs("IQ3_S", _above(b[:, 2:66], planes(b[:, 66:74], 1, 1)))
    step = _odd(planes(b[:, 106:], 1, 4))
    return Coded("iq3_s", with_high(runs, planes(b[:, 74:106], 1, 1), 3), step, half(b, 0))


def _moved(runs: Bytes, minus: NDArray[np.bool_]) -> Bytes:
    """Codes of levels that are an eighth less, or more, than -1, 0 or 1; (B, n): less for a whole run?"""
    codes = runs.reshape(*minus.shape, -1)
    codes <<= np.uint8(1)
    codes |= ~minus[:, :, None]
    return runs


def iq1_s(b: Bytes) -> Coded:
    words = _words(b[:, 34:], "<u2")  # of 32 weights: high bits of four places, a scale, a sign
    runs = _runs("IQ1", _above(b[:, 2:34], _fields(words, 3)))
    code = _moved(runs, np.repeat(words >> 15 == 1, 4, axis=1))
    step = np.repeat(_odd(words >> 12 & 7), 2, axis=1)  # for 16 as in IQ1_M
    return Coded("iq1", code, step, half(b, 0))


def iq1_m(b: Bytes) -> Coded:
    high = planes(b[:, 32:48], 1, 4)
    code = _moved(_runs("IQ1", _above(b[:, :32], high & 7)), high >= 8)
    words = _words(b[:, 48:], "<u2")  # scales, and in the highest four bits a quarter of an fp16
    quarters = words >> 12 << np.array([0, 4, 8, 12], np.uint16)
    block = np.bitwise_or.reduce(quarters, axis=1, keepdims=True).view(np.float16)
    return Coded("iq1", code, _odd(_fields(words, 3)), block.astype(np.float32))
