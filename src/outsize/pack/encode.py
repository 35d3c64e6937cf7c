"""Source numbers -> the fields of an encoded matrix: read, shifted, reordered, stacked, encoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from outsize.checkpoint.checkpoint import read_codes, read_floats
from outsize.checkpoint.coded import Floats
from outsize.encoding.find import encoding
from outsize.encoding.fp8 import Fp8
from outsize.encoding.group import Group
from outsize.encoding.int4 import Int4
from outsize.encoding.int8 import Int8
from outsize.pack.tensors import Part, Piece


def encode(piece: Piece, num_rows: int) -> dict[str, Tensor]:
    """The fields of a piece, padded to `num_rows` rows (the last block of a row table). Codes are
    kept where the source type has the encoding's codes."""
    if piece.encoding in ("int4", "int8", "fp8", "group4", "group5", "group8"):
        found = [read_codes(part.tensor, piece.encoding) for part in piece.parts]
        codes = [c for c in found if c is not None]
        if len(codes) == len(piece.parts):
            code, step, low = (
                _stack(
                    [
                        getattr(c, k)[p.first :: p.step]
                        for c, p in zip(codes, piece.parts, strict=True)
                    ],
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
    floats = [_shifted(p).reshape(-1, piece.width) for p in piece.parts]
    return encoding(piece.encoding).encode(_stack(floats, piece.parts, num_rows))


def _shifted(part: Part) -> Floats:
    numbers = read_floats(part.tensor)
    numbers = numbers.T if part.transposed else numbers
    numbers = np.ascontiguousarray(numbers[part.first :: part.step])
    return numbers + np.float32(part.shift) if part.shift else numbers


def _stack(arrays: Sequence[object], parts: Sequence[Part], num_rows: int) -> Tensor:
    rows = [_interleave(np.asarray(a), p.head_dim) for a, p in zip(arrays, parts, strict=True)]
    whole = np.concatenate(rows) if len(rows) > 1 else rows[0]
    missing = num_rows - len(whole)
    return torch.from_numpy(np.pad(whole, ((0, missing), (0, 0))) if missing else whole.copy())


def _interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:  # type: ignore[type-arg]
    """Heads in halves (i, i + d/2) -> adjacent pairs (2i, 2i + 1); a vector's one row likewise."""
    if not head_dim:
        return rows
    vector = len(rows) == 1
    heads = (rows.T if vector else rows).reshape(
        -1, 2, head_dim // 2, 1 if vector else rows.shape[1]
    )
    mixed = heads.swapaxes(1, 2).reshape(-1, heads.shape[-1])
    return np.ascontiguousarray(mixed.T if vector else mixed)
