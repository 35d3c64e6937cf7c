"""The types of GGUF tensors: how many bytes a block has, which numbers, and how the file codes them.

Every type stores rows in blocks. Types of up to 6 bits are read as codes in a form of kernels/palettes.py,
and their numbers follow from that; they equal the `gguf` package's bit for bit
(tests/checkpoint/test_ggml.py).
Formats: https://github.com/ggml-org/ggml (ggml-common.h, ggml-quants.c).

Shapes: B blocks; N rows, K inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outsize.checkpoint import ggml_iq as iq
from outsize.checkpoint import ggml_k as k
from outsize.checkpoint import ggml_small as small
from outsize.checkpoint.coded import Bytes, Coded, Floats, numbers
from outsize.kernels.palettes import FORMS


def _float(dtype: Any) -> Callable[[Bytes], Floats]:
    return lambda b: b.view(dtype).astype(np.float32)


def _bf16(b: Bytes) -> Floats:
    return (b.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True, slots=True)
class BlockType:
    """One tensor type: `length` weights in `size` bytes. `read` gives the numbers of blocks (B, size), or
    `code` their codes as a matrix of B rows; neither is there where we cannot read it."""

    name: str
    length: int
    size: int
    read: Callable[[Bytes], Floats] | None = None
    code: Callable[[Bytes], Coded] | None = None

    @property
    def is_readable(self) -> bool:
        return self.read is not None or self.code is not None


def _coded(name: str, length: int, size: int, code: Callable[[Bytes], Coded]) -> BlockType:
    return BlockType(name, length, size, code=code)


TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, _float(np.float32)),
    1: BlockType("F16", 1, 2, _float(np.float16)),
    2: _coded("Q4_0", 32, 18, small.q4_0),
    3: _coded("Q4_1", 32, 20, small.q4_1),
    6: _coded("Q5_0", 32, 22, small.q5_0),
    7: _coded("Q5_1", 32, 24, small.q5_1),
    8: _coded("Q8_0", 32, 34, small.q8_0),
    10: _coded("Q2_K", 256, 84, k.q2_k),
    11: _coded("Q3_K", 256, 110, k.q3_k),
    12: _coded("Q4_K", 256, 144, k.q4_k),
    13: _coded("Q5_K", 256, 176, k.q5_k),
    14: _coded("Q6_K", 256, 210, k.q6_k),
    16: _coded("IQ2_XXS", 256, 66, iq.iq2_xxs),
    17: _coded("IQ2_XS", 256, 74, iq.iq2_xs),
    18: _coded("IQ3_XXS", 256, 98, iq.iq3_xxs),
    19: _coded("IQ1_S", 256, 50, iq.iq1_s),
    20: _coded("IQ4_NL", 32, 18, small.iq4_nl),
    21: _coded("IQ3_S", 256, 110, iq.iq3_s),
    22: _coded("IQ2_S", 256, 82, iq.iq2_s),
    23: _coded("IQ4_XS", 256, 136, k.iq4_xs),
    29: _coded("IQ1_M", 256, 56, iq.iq1_m),
    30: BlockType("BF16", 1, 2, _bf16),
    34: _coded("TQ1_0", 256, 54, k.tq1_0),
    35: _coded("TQ2_0", 256, 66, k.tq2_0),
    39: _coded("MXFP4", 32, 17, small.mxfp4),
    40: _coded("NVFP4", 64, 36, small.nvfp4),
    # Known, so that a file with one of them is refused by name rather than as damaged.
    9: BlockType("Q8_1", 32, 40),
    15: BlockType("Q8_K", 256, 292),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
}
# Types that are named in a refusal and whose sizes are not needed: of newer or older versions of ggml, and
# of ik_llama.cpp (from 97 on).
OTHER_TYPES: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "I2_S",
    41: "Q1_0", 42: "Q2_0",
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
    blocks = raw.reshape(-1, kind.size)
    # A scale may be anything in a foreign file; overflow to inf is the reference's answer too.
    with np.errstate(all="ignore"):
        if kind.code is not None:
            return numbers(kind.code(blocks)).reshape(shape)
        assert kind.read is not None, kind.name
        return kind.read(blocks).reshape(shape)


def coded(kind: BlockType, raw: Bytes, shape: tuple[int, int]) -> Coded | None:
    """A matrix as its file codes it; None for a type of floats."""
    if kind.code is None:
        return None
    with np.errstate(all="ignore"):
        c = kind.code(raw.reshape(-1, kind.size))
    rows = shape[0]
    return replace(
        c,
        code_NK=c.code_NK.reshape(shape),
        step_NG=c.step_NG.reshape(rows, -1),
        block_NB=_in_rows(c.block_NB, rows),
        low_NG=_in_rows(c.low_NG, rows),
        low_block_NB=_in_rows(c.low_block_NB, rows),
        outer_N=np.ones(rows, np.float32) if FORMS[c.form].outer else None,
    )


def _in_rows(array: NDArray[Any] | None, rows: int) -> NDArray[Any] | None:
    return None if array is None else array.reshape(rows, -1)


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix as stored: w = step * code + low, in groups of 32 along the last axis."""

    code_NK: Bytes
    step_NG: Floats
    low_NG: Floats


# The encodings that hold the codes of types: each of the groups has the offset of its one type.
_CODES = {
    "int4": ("Q4_0", "Q4_1", "Q4_K"),
    "group4": ("Q4_0",),
    "group5": ("Q5_0", "MXFP4"),
    "group8": ("Q8_0",),
}
_OFFSETS = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}


def codes(kind: BlockType, raw: Bytes, shape: tuple[int, int], encoding: str) -> Codes | None:
    """The stored codes of a matrix, if `encoding` holds codes (and scales) of its type; else None."""
    if kind.name not in _CODES.get(encoding, ()):
        return None
    with np.errstate(all="ignore"):
        return _codes(kind, raw, shape)


def _codes(kind: BlockType, raw: Bytes, shape: tuple[int, int]) -> Codes | None:
    c = coded(kind, raw, shape)
    assert c is not None, kind.name
    if kind.name == "MXFP4":  # powers of two that the records' fp16 may not have
        if not np.array_equal(c.step_NG, c.step_NG.astype(np.float16).astype(np.float32)):
            return None
        levels = np.array(FORMS[c.form].levels, np.int8) + np.int8(16)
        return _symmetric(levels.view(np.uint8)[c.code_NK], c.step_NG, 16, shape)
    if c.low_NG is None:
        return _symmetric(c.code_NK, c.step_NG, _OFFSETS[kind.name], shape)
    return Codes(c.code_NK, _times(c.step_NG, c.block_NB), _times(c.low_NG, c.low_block_NB))


def _symmetric(code: Bytes, step: Floats, offset: int, shape: tuple[int, int]) -> Codes:
    low = step * np.float32(-offset)
    return Codes(code.reshape(shape), step.reshape(shape[0], -1), low.reshape(shape[0], -1))


def _times(whole_NG: NDArray[Any], block_NB: Floats | None) -> Floats:
    if block_NB is None:
        return whole_NG
    return whole_NG.astype(np.float32) * np.repeat(block_NB, 8, axis=1)
