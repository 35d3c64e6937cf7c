"""Palettes: codes of 2 to 6 bits into a table of levels, in every form that a published quantization has.

kernels/palettes.py has the forms and the layout. A matrix of a GGUF type keeps its codes, steps and lows, and
so its numbers, bit for bit. Narrow: our kernel, row-invariant. Wide: many rows decode to bf16 once, then one
matmul. Without our kernel, decoding, much slower, runs anywhere.

Shapes: N rows, K inputs, J tiles of 16 rows, G groups, B blocks of 256 inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from outsize.encoding.frozen import frozen
from outsize.encoding.levels import MOST, between, fit
from outsize.encoding.plain import Encoding, Fields, FieldSpec, Inputs, check_cut, taken
from outsize.errors import UnsupportedError
from outsize.kernels.backend import Backend, Product
from outsize.kernels.palettes import (
    BLOCK,
    DTYPES,
    FORMS,
    LOWS,
    TILE,
    Form,
    PaletteMatrix,
    decode_tiles,
    pack_codes,
    row_codes,
    shared_levels,
    weights,
)
from outsize.kernels.plain import PLAIN

TAKEN = 32  # inputs that kernels take as integers at once


@dataclass(frozen=True, slots=True)
class Palette:
    """`backend`: what computes with the codes."""

    name: str
    form: Form
    backend: Backend = PLAIN
    tolerance: float = 2e-2

    def specs(self, num_rows: int, width: int) -> dict[str, FieldSpec]:
        form, (_, whole) = self.form, self.step(width)
        if width % whole:
            raise UnsupportedError(
                f"{self.name} needs rows of a multiple of {whole} weights, not {width}; use int8"
            )
        tiles = -(-num_rows // TILE)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (tiles, width // TILE, 32 * form.bits)),
            "step": (DTYPES[form.step], (tiles, width // form.group, TILE)),
        }
        if form.step == "int8":
            shapes["block"] = (torch.float16, (tiles, width // BLOCK, TILE))
        if form.low:
            shapes["low"] = (LOWS[form.low], (tiles, width // form.group, TILE))
        if form.low == "int8":
            shapes["low_block"] = (torch.float16, (tiles, width // BLOCK, TILE))
        if form.outer:
            shapes["outer"] = (torch.float32, (tiles, TILE))
        if not form.levels:
            shapes["levels"] = (torch.int8, (tiles, 1 << form.bits))
        return {name: FieldSpec(kind, shape, 0, TILE) for name, (kind, shape) in shapes.items()}

    def stored_rows(self, fields: Fields) -> int:
        return len(fields["codes"]) * TILE

    def encode(self, w_NK: Tensor) -> dict[str, Tensor]:
        """Each weight's nearest level; a group's largest weight sets its step (and its least one its low).
        Levels of each tile's own are fitted first."""
        form = self.form
        if not form.levels:
            return self._fitted(w_NK.float())
        groups = w_NK.float().unflatten(1, (-1, form.group))
        levels = shared_levels(form.levels).float()
        low = groups.new_zeros(groups.shape[:2])
        rows: dict[str, Tensor] = {}
        if form.low:
            low = groups.amin(dim=2).clamp_max(0)
            step = (groups.amax(dim=2) - low) / (levels.max() * form.unit)
            rows, low = self._rounded_lows(step, low)
        else:
            step = groups.abs().amax(dim=2) / (levels.abs().max() * form.unit)
        steps, step = self.rounded(step)
        safe = (step * form.unit).clamp_min(torch.finfo(torch.float32).tiny)[:, :, None]
        codes = _nearest(levels, (groups - low[:, :, None]) / safe)
        return self.from_codes(codes.flatten(1), rows | steps)

    def _fitted(self, w_NK: Tensor) -> dict[str, Tensor]:
        whole = _padded(w_NK, -len(w_NK) % TILE)
        step_NG, levels = fit(self.form, whole)
        scales, step_NG = self.rounded(step_NG)
        x = whole / step_NG.clamp_min(1e-30).repeat_interleave(self.form.group, dim=1)
        codes = torch.searchsorted(between(levels), x.clamp(-MOST, MOST).view(len(levels), -1))
        return self.from_codes(codes.view_as(whole).to(torch.uint8), scales) | {"levels": levels}

    def rounded(self, step_NG: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Steps as stored, and what they are then."""
        if self.form.step != "int8":
            stored = step_NG.to(DTYPES[self.form.step])
            return {"step": stored} | self._ones(len(step_NG)), stored.float()
        small, block, whole = _in_blocks(step_NG, self.form, 127)
        return {"step": small.to(torch.int8), "block": block} | self._ones(len(step_NG)), whole

    def _ones(self, rows: int) -> dict[str, Tensor]:
        return (
            {"outer": torch.ones(rows, dtype=torch.float32, device="cpu")}
            if self.form.outer
            else {}
        )

    def _rounded_lows(self, step_NG: Tensor, low_NG: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if self.form.low == "zero":
            safe = step_NG.to(DTYPES[self.form.step]).float()
            zero = (-low_NG / safe.clamp_min(1e-30)).round().clamp(0, 255)
            return {"low": zero.to(torch.uint8)}, -zero * safe
        if self.form.low == "int8":
            small, block, whole = _in_blocks(-low_NG, self.form, 255)
            return {"low": small.to(torch.uint8), "low_block": -block}, -whole
        stored = low_NG.to(LOWS[self.form.low])
        return {"low": stored}, stored.float()

    def from_codes(self, code_NK: Tensor, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fields of codes, and of steps, blocks, lows and the like by row. Rows are padded with zeros."""
        num_rows, width = code_NK.shape
        specs = self.specs(num_rows, width)
        missing = len(range(num_rows, len(range(0, num_rows, TILE)) * TILE))
        fields = {"codes": pack_codes(self.form.bits, _padded(code_NK, missing))}
        for name, by_row in scales.items():
            tiles = _padded(by_row, missing).unflatten(0, (-1, TILE))
            tiles = tiles if name == "outer" else tiles.transpose(1, 2)
            fields[name] = tiles.to(specs[name].dtype).contiguous()
        return {name: fields[name] for name in specs if name in fields}

    def decode(self, fields: Fields) -> Tensor:
        return decode_tiles(self.form, fields["codes"].shape[1] * TILE, fields)

    def product(self, fields: Fields) -> Product:
        return frozen(self.backend.product(self.coded(fields)), partial(self.decode, fields))

    def linear(self, x_TK: Tensor, fields: Fields, wide: bool) -> Tensor:
        return self.product(fields)(x_TK, wide)

    def rows(self, fields: Fields, ids_T: Tensor) -> Tensor:
        tile_T, row_T = ids_T // TILE, ids_T % TILE
        code_TK = row_codes(self.form.bits, fields["codes"], ids_T)
        by_row = {
            name: field[tile_T, :, row_T].float()[:, None]
            for name, field in fields.items()
            if name not in ("codes", "levels", "outer")
        }
        levels = (
            fields["levels"][tile_T]
            if "levels" in fields
            else shared_levels(self.form.levels)[None]
        )
        outer = fields["outer"][tile_T, row_T][:, None] if self.form.outer else None
        return weights(self.form, code_TK[:, None], by_row, (levels, outer))[:, 0]

    def coded(self, fields: Fields) -> PaletteMatrix:
        packed = fields["codes"]
        return PaletteMatrix(self.form, len(packed) * TILE, packed.shape[1] * TILE, fields)

    def step(self, width: int) -> tuple[int, int]:
        in_blocks = "int8" in (self.form.step, self.form.low)
        return TILE, BLOCK if in_blocks else max(self.form.group, TAKEN)

    def take(self, fields: Fields, rows_N: Tensor | None, inputs: Inputs) -> dict[str, Tensor]:
        width = fields["codes"].shape[1] * TILE
        check_cut(self.name, inputs, self.step(width)[1], width)
        tiles = None if rows_N is None else _tiles(self.name, rows_N)
        by_tile = {"outer", "levels"}  # those that all inputs share
        return {
            name: taken(field, tiles, None if name in by_tile else inputs, width // field.shape[1])
            for name, field in fields.items()
        }


def _tiles(name: str, rows_N: Tensor) -> Tensor:
    """Which tiles rows fill. Raises UnsupportedError for parts of tiles."""
    tiles = rows_N[::TILE] // TILE
    whole = tiles[:, None] * TILE + torch.arange(TILE, dtype=torch.int64, device="cpu")
    if not torch.equal(whole.flatten()[: len(rows_N)], rows_N):
        raise UnsupportedError(
            f"rows of a matrix in {name} cut its tiles: multiples of {TILE} rows are due"
        )
    return tiles


def _padded(by_row: Tensor, missing: int) -> Tensor:
    if not missing:
        return by_row
    return torch.cat([by_row, by_row.new_zeros(missing, *by_row.shape[1:])])


def _in_blocks(numbers_NG: Tensor, form: Form, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers that are not negative as whole ones up to `most`, an fp16 for each 256 inputs, and what the two
    are together."""
    blocks = numbers_NG.unflatten(1, (-1, BLOCK // form.group))
    one = (blocks.amax(dim=2) / most).to(torch.float16)
    safe = one.float().clamp_min(1e-30)[:, :, None]
    small = (blocks / safe).round().clamp(0, most)
    return small.flatten(1), one, (small * one.float()[:, :, None]).flatten(1)


def _nearest(levels: Tensor, numbers: Tensor) -> Tensor:
    """The code of the nearest level, uint8."""
    known, code = levels.sort()
    between = (known[1:] + known[:-1]) / 2
    return code[torch.bucketize(numbers.contiguous(), between)].to(torch.uint8)


ENCODINGS: tuple[Encoding, ...] = tuple(Palette(name, form) for name, form in FORMS.items())
