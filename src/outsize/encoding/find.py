"""All encodings, by the name a pack gives them."""

from __future__ import annotations

from dataclasses import replace

from outsize.encoding import fp8, group, int4, int8, palette, plain
from outsize.encoding.group import Group
from outsize.encoding.int4 import Int4
from outsize.encoding.palette import Palette
from outsize.encoding.plain import Encoding
from outsize.errors import PackError, UnsupportedError
from outsize.kernels.backend import Backend
from outsize.kernels.layouts import torch_reads_tiles
from outsize.kernels.palettes import BLOCK, FORMS
from outsize.kernels.plain import PLAIN

ENCODINGS: dict[str, Encoding] = {
    e.name: e for module in (plain, fp8, int8, int4, group, palette) for e in module.ENCODINGS
}
NATIVE = frozenset(
    n for n, e in ENCODINGS.items() if isinstance(e, Group | Int4 | Palette)
)  # a compiled backend computes them


def encoding(name: str, backend: Backend = PLAIN) -> Encoding:
    """The encoding of that name, computed by `backend`. Raises PackError for a name this version does not
    have."""
    if name not in ENCODINGS:
        raise PackError(f"encoding {name!r} is not known; known are {', '.join(ENCODINGS)}")
    found = ENCODINGS[name]
    return replace(found, backend=backend) if isinstance(found, Group | Int4 | Palette) else found


def gives_fp32(e: Encoding) -> bool:
    """Do products of fp32 inputs keep their precision, and are as fast as those of bf16?"""
    return isinstance(e, Group | Palette)


SIZES = (2, 3, 4, 5, 6)  # bits of a palette's codes
FINE = 6  # of those that replace other codes: more than most had, and still few

# The form that holds a checkpoint tensor's type, where its name is another.
HELD = {
    "IQ1_S": "iq1",
    "IQ1_M": "iq1",
    "IQ2_XS": "iq2",
    "IQ2_S": "iq2",
    "TQ1_0": "tq",
    "TQ2_0": "tq",
}
# Quantized safetensors whose kind is named as the encoding that has its numbers.
HELD_AS_THEY_ARE = ("fp8", "int8")
# Without our kernels: types of few levels, and those of more bits.
CODED = ("Q4_0", "Q4_1", "Q4_K", "Q2_K", "Q3_K")
BYTES = ("Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0")


def form_of(source_type: str) -> str:
    """The palette that keeps a type's numbers; "" for none."""
    name = HELD.get(source_type, source_type.lower())
    return name if name in FORMS else ""


def encoding_for(source_type: str, width: int, wanted: str, grouped: bool) -> str:
    """The encoding to pack a matrix of this type and width in. `wanted`: the one, or "auto"; `grouped`: do
    our kernels run here?"""
    if wanted != "auto":
        return wanted
    form = form_of(source_type)
    if grouped and form and width % 32 == 0:
        return form
    if source_type in HELD_AS_THEY_ARE:
        return source_type
    if source_type in CODED and torch_reads_tiles():
        return "int4"
    return "int8" if form or source_type in BYTES else "bf16"


def encoding_of(size: int, width: int) -> str:
    """The palette with codes of so many bits for rows of this width. Raises UnsupportedError."""
    if width % BLOCK == 0:
        return f"palette{size}"
    if width % FORMS[f"palette{size}-fp16"].group:
        raise UnsupportedError(
            f"rows of {width:,} weights are no multiple of 64, which palettes need; leave --bits out"
        )
    return f"palette{size}-fp16"


def encoding_like(before: str, width: int) -> str:
    """What holds new numbers in place of a matrix: floats for floats; for codes, codes of 6 bits with tables
    of their own, or where rows are of no multiple of 64 weights, of 8 bits."""
    if before in ("fp32", "bf16", "fp16") and before in ENCODINGS:
        return before
    if width % FORMS[f"palette{FINE}-fp16"].group == 0:
        return f"palette{FINE}" if width % BLOCK == 0 else f"palette{FINE}-fp16"
    return "q8_0" if width % FORMS["q8_0"].group == 0 else "bf16"
