"""All encodings, by the name a pack gives them."""

from __future__ import annotations

from dataclasses import replace

from outsize.encoding import fp8, group, int4, int8, plain
from outsize.encoding.group import Group
from outsize.encoding.int4 import Int4
from outsize.encoding.plain import Encoding
from outsize.errors import PackError
from outsize.kernels.backend import Backend
from outsize.kernels.layouts import torch_reads_tiles
from outsize.kernels.plain import PLAIN

ENCODINGS: dict[str, Encoding] = {
    e.name: e
    for e in (
        *plain.ENCODINGS,
        *fp8.ENCODINGS,
        *int8.ENCODINGS,
        *int4.ENCODINGS,
        *group.ENCODINGS,
    )
}
NATIVE = frozenset(
    n for n, e in ENCODINGS.items() if isinstance(e, Group | Int4)
)  # a compiled backend computes them


def encoding(name: str, backend: Backend = PLAIN) -> Encoding:
    """The encoding of that name, computed by `backend`. Raises PackError for a name this version does not
    have."""
    if name not in ENCODINGS:
        raise PackError(f"encoding {name!r} is not known; known are {', '.join(ENCODINGS)}")
    found = ENCODINGS[name]
    return replace(found, backend=backend) if isinstance(found, Group | Int4) else found


# By a checkpoint tensor's type. With our kernels; of other types of more bits, group8.
GROUPED = {"Q4_0": "group4", "Q5_0": "group5", "MXFP4": "group5"}
CODED = ("Q4_0", "Q4_1", "Q4_K", "Q2_K", "Q3_K")
BYTES = ("Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "group8")


def encoding_for(source_type: str, width: int, wanted: str, grouped: bool) -> str:
    """The encoding to pack a matrix of this type and width in. `wanted`: the one, or "auto"; `grouped`: do
    our kernels run here? A type named as an encoding is of quantized safetensors, and that one holds it."""
    if wanted != "auto":
        return wanted
    if source_type in ENCODINGS and source_type not in BYTES:
        return source_type
    fits = grouped and width % 64 == 0
    tiles = grouped or torch_reads_tiles()
    if source_type in CODED and tiles and not (fits and source_type in GROUPED):
        return "int4"
    if source_type not in (*BYTES, *CODED, *GROUPED):
        return "bf16"
    return GROUPED.get(source_type, "group8") if fits else "int8"
