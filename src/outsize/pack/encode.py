"""Source numbers -> the fields of an encoded matrix: read, shifted, reordered, stacked, encoded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from outsize.checkpoint.checkpoint import read_coded, read_codes, read_floats, rows_of
from outsize.checkpoint.coded import Floats
from outsize.encoding.find import encoding
from outsize.encoding.fp8 import Fp8
from outsize.encoding.group import Group
from outsize.encoding.int4 import Int4
from outsize.encoding.int8 import Int8
from outsize.encoding.palette import Palette
from outsize.kernels.palettes import FORMS
from outsize.pack.tables import Matrix
from outsize.pack.tensors import Made, Part, Piece

UNIT = 64  # rows that every encoding can begin at
SLICE = 4 << 20  # weights that are encoded at once; some 25 bytes each are at work for a moment


def encode(piece: Piece | Made, num_rows: int) -> Mapping[str, Tensor]:
    """The fields of a piece, padded to `num_rows` rows (the last block of a row table). Codes are
    kept where the source type has the encoding's codes."""
    if isinstance(piece, Made):
        return piece.fields()
    kept = _kept_palette(piece, num_rows) if piece.encoding in FORMS else _kept(piece, num_rows)
    if kept is not None:
        return kept
    floats = [_shifted(p).reshape(-1, piece.width) for p in piece.parts]
    return encoding(piece.encoding).encode(_stack(floats, piece.parts, num_rows))


def slices(piece: Piece | Made, matrix: Matrix) -> Iterator[tuple[int, int, Piece | Made]]:
    """The same in pieces of few rows, so that a large matrix is never whole in memory: the first row of each
    in the matrix, how many it fills, and what is in them. Whole, where rows cannot be told apart."""
    if isinstance(piece, Made):
        yield 0, matrix.num_rows, piece
        return
    alone = all(spec.row_axis == 0 for spec in matrix.specs.values())
    rows = [part.shape[0] for part in piece.parts]
    if not alone or any(n % UNIT for n in rows[:-1]) or not all(map(_in_order, piece.parts)):
        yield 0, matrix.num_rows, piece
        return
    at = 0
    for part, count in zip(piece.parts, rows, strict=True):
        step = math.lcm(UNIT, part.head_dim or 1)
        step *= max(1, SLICE // (step * piece.width))
        for start in range(0, count, step):
            some = replace(part, tensor=rows_of(part.tensor, start, start + step))
            stop = at + min(step, count - start)
            is_last = stop == sum(rows)
            yield at, (matrix.num_rows if is_last else stop) - at, Piece(piece.encoding, (some,))
            at = stop


def _in_order(part: Part) -> bool:
    """Are its rows those of a stored matrix, one after the other?"""
    whole = (part.first, part.step, part.transposed) == (0, 1, False)
    return whole and len(part.tensor.shape) == 2


def _kept(piece: Piece, num_rows: int) -> dict[str, Tensor] | None:
    """In bytes, int4 or a group, from codes that the source has."""
    if piece.encoding not in ("int4", "int8", "fp8", "group4", "group5", "group8"):
        return None
    found = [read_codes(part.tensor, piece.encoding) for part in piece.parts]
    codes = [c for c in found if c is not None]
    if len(codes) < len(piece.parts):
        return None
    code, step, low = (
        _stack(
            [getattr(c, k)[p.first :: p.step] for c, p in zip(codes, piece.parts, strict=True)],
            piece.parts,
            num_rows,
        )
        for k in ("code_NK", "step_NG", "low_NG")
    )
    if piece.encoding == "int4":
        return Int4().from_codes(code, step, low)
    if piece.encoding == "int8":
        return Int8().from_codes(code.view(torch.int8), step)
    if piece.encoding == "fp8":
        return Fp8().from_codes(code, step)
    return Group(int(piece.encoding[-1])).from_codes(code, step)


# A palette's field, and what a matrix as its file codes it calls that.
SCALES = {
    "step": "step_NG", "block": "block_NB", "low": "low_NG", "low_block": "low_block_NB",
    "outer": "outer_N",
}  # fmt: skip


def _kept_palette(piece: Piece, num_rows: int) -> dict[str, Tensor] | None:
    """In a form that the source's types have."""
    if any(part.shift or part.transposed for part in piece.parts):
        return None
    found = [read_coded(part.tensor) for part in piece.parts]
    coded = [c for c in found if c is not None and c.form == piece.encoding]
    if len(coded) < len(piece.parts):
        return None

    def stacked(name: str) -> Tensor:
        arrays = [
            getattr(c, name)[p.first :: p.step] for c, p in zip(coded, piece.parts, strict=True)
        ]
        return _stack([a.reshape(len(a), -1) for a in arrays], piece.parts, num_rows)

    used = [name for name, own in SCALES.items() if getattr(coded[0], own) is not None]
    scales = {name: stacked(SCALES[name]) for name in used}
    if "outer" in scales:
        scales["outer"] = scales["outer"].flatten()
    return Palette(piece.encoding, FORMS[piece.encoding]).from_codes(stacked("code_NK"), scales)


def _shifted(part: Part) -> Floats:
    numbers = read_floats(part.tensor)
    numbers = numbers.T if part.transposed else numbers
    numbers = np.ascontiguousarray(numbers[part.first :: part.step])
    return numbers + np.float32(part.shift) if part.shift else numbers


def _stack(arrays: Sequence[object], parts: Sequence[Part], num_rows: int) -> Tensor:
    rows = [_interleave(np.asarray(a), p) for a, p in zip(arrays, parts, strict=True)]
    whole = np.concatenate(rows) if len(rows) > 1 else rows[0]
    missing = num_rows - len(whole)
    return torch.from_numpy(np.pad(whole, ((0, missing), (0, 0))) if missing else whole.copy())


def _interleave(rows: np.ndarray, part: Part) -> np.ndarray:  # type: ignore[type-arg]
    """Heads in halves (i, i + r/2) -> adjacent pairs (2i, 2i + 1), of the r first rows of a head, which
    rotate; a vector's one row likewise."""
    head_dim, rotated = part.head_dim, part.rotated or part.head_dim
    if not head_dim:
        return rows
    vector = len(rows) == 1
    heads = (rows.T if vector else rows).reshape(-1, head_dim, 1 if vector else rows.shape[1])
    halves = heads[:, :rotated].reshape(len(heads), 2, rotated // 2, -1)
    pairs = halves.swapaxes(1, 2).reshape(len(heads), rotated, -1)
    mixed = np.concatenate([pairs, heads[:, rotated:]], axis=1).reshape(-1, heads.shape[-1])
    return np.ascontiguousarray(mixed.T if vector else mixed)
