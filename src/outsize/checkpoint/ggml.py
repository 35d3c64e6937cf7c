"""The block formats of GGUF tensors: how many bytes, and which numbers.

Every format stores rows in blocks. A block format with at most 16 levels a group (`codes`) can be
moved into an int4 record without changing a code; all others are read through `dequantize`, whose
results equal the `gguf` package's bit for bit (tests/checkpoint/test_checkpoint.py).
Formats: https://github.com/ggml-org/ggml (ggml-common.h).

Shapes: B blocks; a block of the K formats holds 8 or 16 groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Stored = tuple[Bytes, Floats, Floats]  # codes, steps, lows


def _half(blocks: Bytes, at: int) -> Floats:
    """The fp16 at byte `at` of every block, as fp32 (B, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """(..., n) bytes -> (..., 2n) codes: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """32 bits at byte `at`, one a weight, already in place 4: (B, 32)."""
    bits = np.unpackbits(blocks[:, at : at + 4], axis=-1, bitorder="little")
    return np.left_shift(bits, np.uint8(4))


def _six_bit_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 12 bytes of Q4_K and Q5_K that hold 8 scales and 8 minimums of 6 bits: two (B, 8)."""
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    return scales, np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], axis=-1)


def _q4_0(b: Bytes) -> Floats:
    return _half(b, 0) * (_nibbles(b[:, 2:]).astype(np.int8) - np.int8(8)).astype(np.float32)


def _q4_1(b: Bytes) -> Floats:
    return _half(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b, 2)


def _q5_0(b: Bytes) -> Floats:
    codes = (_nibbles(b[:, 6:]) | _fifth_bits(b, 2)).astype(np.int8) - np.int8(16)
    return _half(b, 0) * codes.astype(np.float32)


def _q5_1(b: Bytes) -> Floats:
    codes = _nibbles(b[:, 8:]) | _fifth_bits(b, 4)
    return _half(b, 0) * codes.astype(np.float32) + _half(b, 2)


def _q8_0(b: Bytes) -> Floats:
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def _two_bits(packed: Bytes, num_groups: int) -> Bytes:
    """(B, 64) bytes -> (B, num_groups, 256 / num_groups) codes of 2 bits, in runs of 32 bytes."""
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    pairs = np.right_shift(packed.reshape(-1, 2, 1, 32), shifts) & np.uint8(3)
    return pairs.reshape(len(packed), num_groups, -1)


def _q2_k(b: Bytes) -> Floats:
    scales = b[:, :16]
    step = _half(b, 80) * (scales & 15).astype(np.float32)
    low = _half(b, 82) * (scales >> 4).astype(np.float32)
    codes = _two_bits(b[:, 16:80], 16).astype(np.float32)
    return step[:, :, None] * codes - low[:, :, None]


def _q3_k(b: Bytes) -> Floats:
    high, packed = b[:, 96:104], b[:, 104:108]
    low4 = np.concatenate([high & 15, high >> 4], axis=-1)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
    high2 = (packed[:, None, :] >> shifts & 3).reshape(-1, 16)
    scales = (low4 | high2 << 4).astype(np.int8) - np.int8(32)
    bits = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    missing = ((b[:, None, :32] >> bits & 1) ^ 1).reshape(-1, 16, 16)
    codes = _two_bits(b[:, 32:96], 16).astype(np.int8) - (missing << 2).astype(np.int8)
    step: Floats = _half(b, 108) * scales.astype(np.float32)
    return step[:, :, None] * codes.astype(np.float32)


def _k_steps(b: Bytes) -> tuple[Floats, Floats]:
    """Step and minimum of the 8 groups of Q4_K and Q5_K blocks: two (B, 8)."""
    scales, minimums = _six_bit_scales(b[:, 4:16])
    return _half(b, 0) * scales.astype(np.float32), _half(b, 2) * minimums.astype(np.float32)


def _k_codes(packed: Bytes) -> Bytes:
    """(B, 128) bytes -> (B, 8, 32) codes of 4 bits."""
    return _nibbles(packed.reshape(-1, 4, 32)).reshape(-1, 8, 32)


def _q4_k(b: Bytes) -> Floats:
    step, low = _k_steps(b)
    return step[:, :, None] * _k_codes(b[:, 16:]).astype(np.float32) - low[:, :, None]


def _q5_k(b: Bytes) -> Floats:
    step, low = _k_steps(b)
    bits = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    codes = _k_codes(b[:, 48:]) | (b[:, None, 16:48] >> bits & 1) << 4
    return step[:, :, None] * codes.astype(np.float32) - low[:, :, None]


def _q6_k(b: Bytes) -> Floats:
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 8, 32)
    codes = ((low | high << 4).astype(np.int8) - np.int8(32)).reshape(-1, 16, 16)
    step = _half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    return step[:, :, None] * codes.astype(np.float32)


# Twice the numbers of FP4 (E2M1), by code: whole numbers, so that 5 bits hold them exactly.
_FP4_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def _mxfp4_step(b: Bytes) -> Floats:
    """Half of each block's scale, a power of two: (B, 1)."""
    return np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128).astype(np.float32)


def _mxfp4(b: Bytes) -> Floats:
    return _mxfp4_step(b) * _FP4_TWICE[_nibbles(b[:, 1:])].astype(np.float32)


def _codes_mxfp4(b: Bytes) -> Stored:
    code = (_FP4_TWICE[_nibbles(b[:, 1:])] + np.int8(16)).astype(np.uint8)
    return _symmetric(code, _mxfp4_step(b), 16)


def joined_mxfp4(codes: Bytes, scales: Bytes) -> Bytes:
    """Blocks as a GGUF has them of the two tensors of a safetensors file: there a byte holds neighbours, here
    numbers that are 16 apart."""
    numbers = _split_neighbours(codes.reshape(-1, 16))
    halves = numbers[:, :16] | numbers[:, 16:] << 4
    return np.concatenate([scales.reshape(-1, 1), halves], axis=1).reshape(-1)


def _split_neighbours(b: Bytes) -> Bytes:
    """(B, 16) -> (B, 32): of each byte the low nibble, then the high one."""
    return np.stack([b & np.uint8(15), b >> np.uint8(4)], axis=2).reshape(len(b), -1)


def _float(dtype: Any) -> Callable[[Bytes], Floats]:
    return lambda b: b.view(dtype).astype(np.float32)


def _bf16(b: Bytes) -> Floats:
    return (b.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True, slots=True)
class BlockType:
    """One tensor type: `length` weights in `size` bytes; None where we cannot read its numbers."""

    name: str
    length: int
    size: int
    read: Callable[[Bytes], Floats] | None = None


TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, _float(np.float32)),
    1: BlockType("F16", 1, 2, _float(np.float16)),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    30: BlockType("BF16", 1, 2, _bf16),
    # Known, so that a file with one of them is refused by name rather than as damaged.
    9: BlockType("Q8_1", 32, 40),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17, _mxfp4),
}
# Types that are named in a refusal and whose sizes are not needed: of newer or older versions of ggml, and
# of ik_llama.cpp (from 97 on).
OTHER_TYPES: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "I2_S",
    40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
    97: "Q8_0_X4", 98: "Q8_1_X4", 99: "Q8_2_X4", 133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 136: "Q8_K64",
    137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS",
    146: "IQ4_KSS", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL",
    158: "IQ1_KT", 202: "Q4_0_R8", 206: "Q5_0_R4", 208: "Q8_0_R8", 210: "Q2_K_R4", 211: "Q3_K_R4",
    212: "Q4_K_R4", 213: "Q5_K_R4", 214: "Q6_K_R4", 216: "IQ2_XXS_R4", 217: "IQ2_XS_R4", 218: "IQ3_XXS_R4",
    219: "IQ1_S_R4", 220: "IQ4_NL_R4", 221: "IQ3_S_R4", 222: "IQ2_S_R4", 223: "IQ4_XS_R8", 229: "IQ1_M_R4",
    230: "BF16_R16", 233: "Q6_0_R4", 335: "IQ2_BN_R4", 337: "IQ2_K_R4", 338: "IQ3_K_R4", 339: "IQ4_K_R4",
    340: "IQ5_K_R4", 344: "IQ4_KS_R4", 352: "IQ5_KS_R4", 398: "Q8_KV_R8", 399: "Q8_K_R8",
}  # fmt: skip
IK = range(97, 400)  # type numbers of ik_llama.cpp


def other_type(number: int) -> str:
    """What a type number that is not in TYPES stands for, in words."""
    name = OTHER_TYPES.get(number)
    if number in IK:
        return f"{name or f'number {number}'} of ik_llama.cpp"
    return name or f"number {number}, which is not known here"


BY_NAME = {kind.name: kind for kind in TYPES.values()}


def dequantize(kind: BlockType, raw: Bytes, shape: tuple[int, ...]) -> Floats:
    """The numbers of a tensor, fp32, in its own shape (last axis fastest)."""
    assert kind.read is not None, kind.name
    blocks = raw.reshape(-1, kind.size)
    # A scale may be anything in a foreign file; overflow to inf is the reference's answer too.
    with np.errstate(all="ignore"):
        return kind.read(blocks).reshape(shape)


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix as stored: w = step * code + low, in groups of 32 along the last axis."""

    code_NK: Bytes
    step_NG: Floats
    low_NG: Floats


def _symmetric(code: Bytes, step: Floats, offset: int) -> Stored:
    return code, step, step * np.float32(-offset)


def _codes_q4_k(b: Bytes) -> Stored:
    step, low = _k_steps(b)
    return _k_codes(b[:, 16:]), step, -low


# By the encoding that holds such codes: each of the groups has the offset of its one type.
_CODES: dict[str, dict[str, Callable[[Bytes], Stored]]] = {
    "int4": {
        "Q4_0": lambda b: _symmetric(_nibbles(b[:, 2:]), _half(b, 0), 8),
        "Q4_1": lambda b: (_nibbles(b[:, 4:]), _half(b, 0), _half(b, 2)),
        "Q4_K": _codes_q4_k,
    },
    "group4": {"Q4_0": lambda b: _symmetric(_nibbles(b[:, 2:]), _half(b, 0), 8)},
    "group5": {
        "Q5_0": lambda b: _symmetric(_nibbles(b[:, 6:]) | _fifth_bits(b, 2), _half(b, 0), 16),
        "MXFP4": _codes_mxfp4,
    },
    "group8": {"Q8_0": lambda b: _symmetric(b[:, 2:] ^ np.uint8(128), _half(b, 0), 128)},
}


def codes(kind: BlockType, raw: Bytes, shape: tuple[int, int], encoding: str) -> Codes | None:
    """The stored codes of a matrix, if `encoding` holds codes (and scales) of its type; else None."""
    read = _CODES.get(encoding, {}).get(kind.name)
    if read is None:
        return None
    code, step, low = read(raw.reshape(-1, kind.size))
    if kind.name == "MXFP4":  # a power of two that the records' fp16 may not have
        with np.errstate(over="ignore"):
            if not np.array_equal(step, step.astype(np.float16).astype(np.float32)):
                return None
    rows = shape[0]
    return Codes(code.reshape(shape), step.reshape(rows, -1), low.reshape(rows, -1))
