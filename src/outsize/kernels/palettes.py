"""How palettes lie in memory: codes of 2 to 6 bits, or 8, which point into a table of levels, in groups of
inputs that share a step. csrc/palettes.c reads the same layout.

    w[n, k] = unit * step[n, k / group] * levels[code[n, k]]  (* outer[n])  (+ low[n, k / group])

A step is a float; or a whole number of 8 bits times a float that `BLOCK` inputs share, and a low likewise.
So a form holds exactly what a published block format holds: products of codes, steps and blocks are exact in
fp32; multiplying by `outer` rounds, and adding the low, once each, as in the format's own definition.

Tiles of 16 rows, each 16 inputs after the other: planes of 64 bytes, byte 4r + i of which is of row r and of
inputs i, 4 + i, 8 + i and 12 + i (slots 0 to 3). A plane of 2 bits has all four slots, the first lowest; one
of 4 bits two slots, so there are two; one of 8 bits a slot; one of 1 bit is 32 bytes: 64 bits for each slot.
Codes of 2, 4 and 8 bits are such planes; of 3 and 5, these and then their highest bits; of 6, planes of 4 and
one of the 2 highest. Codes of 8 bits are their levels, but for an offset. Steps and lows of a tile's 16 rows
lie side by side. Rows are padded to 16 with zeros.

Shapes: N rows, K inputs, J tiles of 16 rows, G groups, B blocks of 256 inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

TILE = 16  # rows that lie together, and inputs
BITS = [1, 2, 4, 8, 16, 32, 64, 128]
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
    w = step * (level - zero). `outer`: is there an fp32 for each row? (With lows there is none, and the unit
    is 1.)"""

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
    "q8_0": Form(8, 32, _linear(8, 128)),
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
    **{f"int4-{g}-fp32": Form(4, g, _linear(4, 8), "fp32") for g in (32, 128)},
    "int8-128": Form(8, 128, _linear(8, 128)),
    **{f"int8-{g}-bf16": Form(8, g, _linear(8, 128), "bf16") for g in (32, 128)},
    **{f"int8-{g}-fp32": Form(8, g, _linear(8, 128), "fp32") for g in (32, 128)},
    **{f"int4-{g}": Form(4, g, _linear(4, 8)) for g in (32, 64, 128, 256)},
    **{f"int4-{g}-bf16": Form(4, g, _linear(4, 8), "bf16") for g in (32, 64, 128, 256)},
    **{f"uint4-{g}": Form(4, g, _linear(4, 0), "fp16", "zero") for g in (32, 64, 128, 256)},
    **{f"uint4-{g}-bf16": Form(4, g, _linear(4, 0), "bf16", "zero") for g in (32, 64, 128, 256)},
    # Ours: levels of each tile's own, fitted to the weights (encoding/levels.py).
    **{f"palette{b}": Form(b, 64, (), "int8") for b in range(2, 7)},
    **{f"palette{b}-fp16": Form(b, 64, ()) for b in range(2, 7)},  # for any multiple of 64 inputs
}

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "int8": torch.int8,
}
LOWS = {"fp16": torch.float16, "int8": torch.uint8, "zero": torch.uint8}


@dataclass(frozen=True, slots=True)
class PaletteMatrix:
    """An encoded matrix (N, K), N a multiple of 16, in memory: `fields` by name, as specs() in
    encoding/palette.py has them."""

    form: Form
    rows: int
    width: int
    fields: Mapping[str, Tensor]

    def some(self, start: int, stop: int) -> PaletteMatrix:
        """Some rows, in multiples of 16: views, no copy."""
        tiles = slice(start // TILE, stop // TILE)
        fields = {name: field[tiles] for name, field in self.fields.items()}
        return PaletteMatrix(self.form, stop - start, self.width, fields)


@cache
def shared_levels(levels: tuple[int, ...]) -> Tensor:
    return torch.tensor(levels, dtype=torch.int8, device="cpu")


def offset_levels(form: Form) -> tuple[Tensor | None, int]:
    """The levels of all tiles as bytes that are not negative, and what is too much in them; no levels where a
    code is one, and its bits are more than a register looks up."""
    first = form.levels[0]
    if form.bits > 4 and form.levels == tuple(range(first, first + len(form.levels))):
        return None, -first
    offset = -min(form.levels)
    return (shared_levels(form.levels).short() + offset).to(torch.uint8), offset


def pack_codes(bits: int, code_NK: Tensor) -> Tensor:
    """(N, K) codes -> (J, K / 16, 32 * bits) bytes."""
    tiles = code_NK.view(-1, TILE, code_NK.shape[1] // TILE, 4, 4)  # (J, r, K / 16, slot, i)
    slots = tiles.permute(3, 0, 2, 1, 4).flatten(3)  # (slot, J, K / 16, 64 bytes)
    if bits == 8:
        return torch.cat(list(slots), dim=2)
    low, ones = (4 if bits >= 4 else 2), torch.tensor(BITS, dtype=torch.uint8, device="cpu")
    if low == 4:
        a, b, c, d = slots & 15
        planes = [a | b << 4, c | d << 4]
    else:
        planes = [_two_bits(slots & 3)]
    if bits in (3, 5):
        high = (slots >> low).unflatten(3, (8, 8)) * ones
        planes += list(high.sum(dim=4, dtype=torch.uint8))
    elif bits == 6:
        planes.append(_two_bits(slots >> low))
    return torch.cat(planes, dim=2)


def _two_bits(slots: Tensor) -> Tensor:
    a, b, c, d = slots
    packed: Tensor = a | b << 2 | c << 4 | d << 6
    return packed


def unpack_codes(bits: int, packed: Tensor) -> Tensor:
    """(..., 32 * bits) bytes -> (..., 16 rows, 4 slots, 4) codes of 16 inputs."""
    if bits == 8:
        low, used = list(packed.split(64, dim=-1)), packed.shape[-1]
    elif bits >= 4:
        low, used = (
            [packed[..., 64 * (j // 2) :][..., :64] >> 4 * (j % 2) & 15 for j in range(4)],
            128,
        )
    else:
        low, used = [packed[..., :64] >> 2 * j & 3 for j in range(4)], 64
    rest, at = packed[..., used:], 4 if bits >= 4 else 2
    if bits in (3, 5):
        shifts = torch.arange(8, dtype=torch.uint8, device="cpu")
        high = [(rest[..., 8 * j : 8 * j + 8, None] >> shifts & 1).flatten(-2) for j in range(4)]
        low = [code | h << at for code, h in zip(low, high, strict=True)]
    elif bits == 6:
        low = [code | (rest >> 2 * j & 3) << at for j, code in enumerate(low)]
    codes: Tensor = torch.stack(low, dim=-2).unflatten(-1, (TILE, 4)).transpose(-3, -2)
    return codes


def row_codes(bits: int, packed: Tensor, ids_T: Tensor) -> Tensor:
    """(T, K) codes of some rows of the (J, K / 16, 32 * bits) bytes of all: no tile is unpacked whole."""
    whole, high = (32 * bits // 64 * 64, 32) if bits in (3, 5) else (32 * bits, 0)
    tile_T, row_T = ids_T // TILE, ids_T % TILE
    by_row = packed[..., :whole].unflatten(-1, (-1, TILE, 4))
    planes = by_row[tile_T, :, :, row_T]  # (T, K / 16, plane, 4)
    made: list[Tensor]
    if bits == 8:
        made = list(planes.unbind(2))
    elif bits < 4:
        made = [planes[:, :, 0] >> 2 * j & 3 for j in range(4)]
    else:
        made = [planes[:, :, j // 2] >> 4 * (j % 2) & 15 for j in range(4)]
    if bits == 6:
        made = [code | (planes[:, :, 2] >> 2 * j & 3) << 4 for j, code in enumerate(made)]
    if high:
        by_slot = packed[..., whole:].unflatten(-1, (4, 8))
        ones = by_slot[tile_T, :, :, row_T // 2]  # (T, K / 16, slot)
        ones = ones >> (row_T % 2 * 4).to(torch.uint8)[:, None, None]
        inputs = torch.arange(4, dtype=torch.uint8, device="cpu")
        at = 4 if bits > 4 else 2
        made = [code | (ones[:, :, j, None] >> inputs & 1) << at for j, code in enumerate(made)]
    return torch.stack(made, dim=2).flatten(1)


def decode_tiles(form: Form, width: int, fields: Mapping[str, Tensor]) -> Tensor:
    """(J * 16, K) fp32: every weight of the fields of J tiles."""
    codes = unpack_codes(form.bits, fields["codes"])  # (J, K / 16, 16 rows, 4, 4)
    code_JRK = codes.transpose(1, 2).reshape(len(codes), TILE, width)
    scales = {n: f.float() for n, f in fields.items() if n not in ("codes", "levels", "outer")}
    by_row = {n: f.transpose(1, 2) for n, f in scales.items()}  # (J, 16, G)
    levels = fields.get("levels", shared_levels(form.levels)[None])
    outer = fields.get("outer")
    return weights(form, code_JRK, by_row, (levels, outer)).reshape(-1, width)


def palette_numbers(m: PaletteMatrix) -> Tensor:
    """(N, K) fp32."""
    return decode_tiles(m.form, m.width, m.fields)


def weights(
    form: Form,
    code_JRK: Tensor,
    scales_JRG: Mapping[str, Tensor],
    own: tuple[Tensor, Tensor | None],
) -> Tensor:
    """(J, R, K) fp32 of codes and scales; `own`: levels (J or 1, 2 ** bits), and outer (J, R) or none."""
    levels, outer = own
    num, rows, width = code_JRK.shape
    table = levels.float().expand(num, -1)
    found = table.gather(1, code_JRK.reshape(num, -1).long()).view(num, rows, -1, form.group)
    step = _over_blocks(form, scales_JRG["step"], scales_JRG.get("block")) * form.unit
    out = found * step[..., None]
    if outer is not None:
        out = out * outer[:, :, None, None]
    if form.low:
        low = _over_blocks(form, scales_JRG["low"], scales_JRG.get("low_block"))
        out = out + (-step * low if form.low == "zero" else low)[..., None]
    return out.view(num, rows, width)


def _over_blocks(form: Form, small_JRG: Tensor, block_JRB: Tensor | None) -> Tensor:
    if block_JRB is None:
        return small_JRG
    return small_JRG * block_JRB.repeat_interleave(BLOCK // form.group, dim=2)
