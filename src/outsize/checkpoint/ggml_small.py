"""GGUF types whose blocks hold 32 weights, or 64: from blocks to the form that holds them.

Shapes: B blocks; every function takes them as (B, size) and gives a matrix of B rows.
"""

from __future__ import annotations

import numpy as np

from outsize.checkpoint.coded import Bytes, Coded, Floats
from outsize.checkpoint.ggml_bits import half, planes, with_high


def q4_0(b: Bytes) -> Coded:
    return Coded("q4_0", planes(b[:, 2:], 16, 4), half(b, 0))


def q4_1(b: Bytes) -> Coded:
    return Coded("q4_1", planes(b[:, 4:], 16, 4), half(b, 0), low_NG=half(b, 2))


def _five_bits(b: Bytes, at: int) -> Bytes:
    """The highest bits of 32 codes, then their nibbles."""
    return with_high(planes(b[:, at + 4 :], 16, 4), planes(b[:, at : at + 4], 1, 1), 4)


def q5_0(b: Bytes) -> Coded:
    return Coded("q5_0", _five_bits(b, 2), half(b, 0))


def q5_1(b: Bytes) -> Coded:
    return Coded("q5_1", _five_bits(b, 4), half(b, 0), low_NG=half(b, 2))


def q8_0(b: Bytes) -> Coded:
    return Coded("q8_0", b[:, 2:] ^ np.uint8(128), half(b, 0))


def iq4_nl(b: Bytes) -> Coded:
    return Coded("iq4_nl", planes(b[:, 2:], 16, 4), half(b, 0))


def mxfp4(b: Bytes) -> Coded:
    """The scale is a byte: the exponent of a power of two, of which the form has half."""
    step = np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128).astype(np.float32)
    return Coded("mxfp4", planes(b[:, 1:], 16, 4), step)


def joined_mxfp4(codes: Bytes, scales: Bytes) -> Bytes:
    """Blocks as a GGUF has them of the two tensors of a safetensors file: there a byte holds neighbours, here
    numbers that are 16 apart."""
    numbers = planes(codes.reshape(-1, 16), 1, 4)
    halves = numbers[:, :16] | numbers[:, 16:] << np.uint8(4)
    return np.concatenate([scales.reshape(-1, 1), halves], axis=1).reshape(-1)


def _ue4m3() -> Floats:
    """What a byte means as an unsigned float of 4 and 3 bits. The highest bit means nothing, and NaN is 0."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    whole = fraction + np.where(exponent == 0, 0, 8)
    out: Floats = np.ldexp(whole.astype(np.float32), np.maximum(exponent, 1) - 10)
    out[0x7F] = 0
    return out


_UE4M3 = _ue4m3()


def nvfp4(b: Bytes) -> Coded:
    """Four groups of 16. A scale of the whole tensor lies in a tensor of its own."""
    return Coded("nvfp4", planes(b[:, 4:], 8, 4), _UE4M3[b[:, :4]])
