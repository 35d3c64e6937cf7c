"""GGUF types whose blocks hold 256 weights as codes in bit planes: the K types, IQ4_XS and TQ types.

Shapes: B blocks; every function takes them as (B, size) and gives a matrix of B rows. A block has 8 or 16
groups, whose steps are whole numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from outsize.checkpoint.coded import Bytes, Coded
from outsize.checkpoint.ggml_bits import half, planes, with_high


def _signed(six_bits: Bytes) -> NDArray[np.int8]:
    """Numbers of 6 bits that are stored 32 too high."""
    return six_bits.view(np.int8) - np.int8(32)


def q2_k(b: Bytes) -> Coded:
    step, low = (b[:, :16] & np.uint8(15)).view(np.int8), b[:, :16] >> np.uint8(4)
    return Coded("q2_k", planes(b[:, 16:80], 32, 2), step, half(b, 80), low, -half(b, 82))


def q3_k(b: Bytes) -> Coded:
    code = with_high(planes(b[:, 32:96], 32, 2), planes(b[:, :32], 32, 1), 2)
    scales = with_high(planes(b[:, 96:104], 8, 4), planes(b[:, 104:108], 4, 2), 4)
    return Coded("q3_k", code, _signed(scales), half(b, 108))


def _of_q4_k(b: Bytes, form: str, code: Bytes) -> Coded:
    """12 bytes of Q4_K and Q5_K hold 8 steps and 8 lows of 6 bits, of which the last four are cut in two."""
    first, second, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    four, two = np.uint8(4), np.uint8(2)
    steps = [first & np.uint8(63), (rest & np.uint8(15)) | (first >> two & np.uint8(48))]
    lows = [second & np.uint8(63), rest >> four | (second >> two & np.uint8(48))]
    step = np.concatenate(steps, axis=1).view(np.int8)
    return Coded(form, code, step, half(b, 0), np.concatenate(lows, axis=1), -half(b, 2))


def q4_k(b: Bytes) -> Coded:
    return _of_q4_k(b, "q4_k", planes(b[:, 16:], 32, 4))


def q5_k(b: Bytes) -> Coded:
    return _of_q4_k(b, "q5_k", with_high(planes(b[:, 48:], 32, 4), planes(b[:, 16:48], 32, 1), 4))


def q6_k(b: Bytes) -> Coded:
    code = with_high(planes(b[:, :128], 64, 4), planes(b[:, 128:192], 32, 2), 4)
    return Coded("q6_k", code, b[:, 192:208].view(np.int8), half(b, 208))


def iq4_xs(b: Bytes) -> Coded:
    scales = with_high(planes(b[:, 4:8], 1, 4), planes(b[:, 2:4], 1, 2), 4)
    return Coded("iq4_xs", planes(b[:, 8:], 16, 4), _signed(scales), half(b, 0))


def tq1_0(b: Bytes) -> Coded:
    """Five codes of base 3 in a byte, and four in each of the last: as a fraction of 256, so that the highest
    digit is what multiplying by 3 carries."""
    digits = [_base_3(b[:, :32], 5), _base_3(b[:, 32:48], 5), _base_3(b[:, 48:52], 4)]
    return Coded("tq", np.concatenate(digits, axis=1), half(b, 52))


def _base_3(packed: Bytes, count: int) -> Bytes:
    """(B, n) bytes -> (B, count * n) digits: the first of every byte, then the second, ..."""
    rest = packed[:, None, :] * (3 ** np.arange(count)).astype(np.uint8)[:, None]
    return (rest.astype(np.uint16) * np.uint16(3) >> 8).astype(np.uint8).reshape(len(packed), -1)


def tq2_0(b: Bytes) -> Coded:
    return Coded("tq", planes(b[:, :64], 32, 2), half(b, 64))
