"""How palettes lie in memory: codes of 2 to 6 bits, which point into a table of levels, in groups of inputs
that share a step. csrc/palettes.c reads the same layout.

    w[n, k] = unit * step[n, k / group] * levels[code[n, k]]  (* outer[n])  (+ low[n, k / group])

A step is a float; or a whole number of 8 bits times a float that `BLOCK` inputs share, and a low likewise.
So a form holds exactly what a published block format holds: products of codes, steps and blocks are exact in
fp32; multiplying by `outer` rounds, and adding the low, once each, as in the format's own definition.

Tiles of 16 rows: for every 16 inputs, 32 lanes; lane 2r + i holds the codes of row r and inputs 2p + i,
p = 0 to 7, the first in its lowest bits. 2 bits: lanes of 16 bits; 4: two times that (p < 4, and the rest);
3, 5, 6: those, then the highest one (a byte a lane) or two bits (16 bits a lane) apart. Steps and lows of a
tile's 16 rows lie side by side. Rows are padded to 16 with zeros.

Shapes: N rows, K inputs, J tiles of 16 rows, G groups, B blocks of 256 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 16  # rows that lie together, and inputs
BLOCK = 256  # inputs whose steps share a float, where steps are whole numbers


def _linear(bits: int, offset: int) -> tuple[int, ...]:
    return tuple(code - offset for code in range(1 << bits))


def _signed(*magnitudes: int) -> tuple[int, ...]:
    """Positive ones first; the code's highest bit is the sign."""
    return (*magnitudes, *(-m for m in magnitudes))


@dataclass(frozen=True, slots=True)
class Form:
    """One way of storing: which levels a code may mean, and what a group has. `levels`: whole numbers of
    8 bits, 2 ** bits of them (unused ones 0); none: each tile has its own, stored beside the codes. `step`,
    `low`: "fp16", "bf16" or "fp32" for a float a group; "int8": whole numbers and an fp16 for each 256
    inputs; `low` "" for none, or "zero": a whole number that is taken from the level, as in
    w = step * (level - zero). `outer`: is there an fp32 for each row?"""

    bits: int
    group: int
    levels: tuple[int, ...]
    step: str = "fp16"
    low: str = ""
    unit: float = 1.0  # a power of two
    outer: bool = False


_FP4_TWICE = _signed(0, 1, 2, 3, 4, 6, 8, 12)
_NL4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_IQ3_XXS = _signed(4, 12, 20, 28, 36, 44, 52, 62)
_IQ3_S = _signed(1, 3, 5, 7, 9, 11, 13, 15)
_IQ2 = (8, 25, 43, 0, -8, -25, -43, 0)
_IQ1 = (-9, -7, -1, 1, 7, 9, 0, 0)  # -1, 0 or 1, an eighth less or more

# By the name of the encoding, which is a GGUF type's where it holds those.
FORMS: dict[str, Form] = {
    "q2_k": Form(2, 16, _linear(2, 0), "int8", "int8"),
    "q3_k": Form(3, 16, _linear(3, 4), "int8"),
    "q4_0": Form(4, 32, _linear(4, 8)),
    "q4_1": Form(4, 32, _linear(4, 0), "fp16", "fp16"),
    "q4_k": Form(4, 32, _linear(4, 0), "int8", "int8"),
    "q5_0": Form(5, 32, _linear(5, 16)),
    "q5_1": Form(5, 32, _linear(5, 0), "fp16", "fp16"),
    "q5_k": Form(5, 32, _linear(5, 0), "int8", "int8"),
    "q6_k": Form(6, 16, _linear(6, 32), "int8"),
    "tq": Form(2, 256, (-1, 0, 1, 2)),  # TQ1_0, TQ2_0
    "iq1": Form(3, 16, _IQ1, "int8", unit=1 / 8),  # IQ1_S, IQ1_M
    "iq2_xxs": Form(3, 32, _IQ2, "int8", unit=1 / 8),
    "iq2": Form(3, 16, _IQ2, "int8", unit=1 / 8),  # IQ2_XS, IQ2_S
    "iq3_xxs": Form(4, 32, _IQ3_XXS, "int8", unit=1 / 4),
    "iq3_s": Form(4, 32, _IQ3_S, "int8"),
    "iq4_nl": Form(4, 32, _NL4),
    "iq4_xs": Form(4, 32, _NL4, "int8"),
    "mxfp4": Form(4, 32, _FP4_TWICE, "bf16"),  # half of each scale, a power of two
    "nvfp4": Form(4, 16, _FP4_TWICE, unit=1 / 2, outer=True),
    **{f"int4-{g}": Form(4, g, _linear(4, 8)) for g in (32, 64, 128, 256)},
    **{f"int4-{g}-bf16": Form(4, g, _linear(4, 8), "bf16") for g in (32, 64, 128, 256)},
    **{f"uint4-{g}": Form(4, g, _linear(4, 0), "fp16", "zero") for g in (32, 64, 128, 256)},
    **{f"uint4-{g}-bf16": Form(4, g, _linear(4, 0), "bf16", "zero") for g in (32, 64, 128, 256)},
}
