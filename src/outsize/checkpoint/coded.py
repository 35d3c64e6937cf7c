"""A matrix as its file stores it: codes, and what they mean, in a form of kernels/palettes.py.

Shapes: N rows, K inputs, G groups, B blocks of 256 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outsize.kernels.palettes import BLOCK, FORMS

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Coded:
    """w = unit * block * step * levels[code] * outer + low_block * low. Floats are fp32 and exactly what the
    form's own type holds; a step is float, or int8 with a block; a low is float, or uint8 with a block of its
    own, or (form.low "zero") uint8 without: w = step * (level - low)."""

    form: str  # a name in FORMS
    code_NK: Bytes
    step_NG: NDArray[Any]
    block_NB: Floats | None = None
    low_NG: NDArray[Any] | None = None
    low_block_NB: Floats | None = None
    outer_N: Floats | None = None


def numbers(c: Coded) -> Floats:
    """(N, K) fp32. Products are exact; adding a low rounds, once."""
    form = FORMS[c.form]
    levels = np.array(form.levels, np.float32)[c.code_NK]
    rows, groups = c.step_NG.shape
    with np.errstate(all="ignore"):  # a foreign scale may be anything
        step = _times(c.step_NG, c.block_NB, form.group) * np.float32(form.unit)
        out: Floats = step[:, :, None] * levels.reshape(rows, groups, form.group)
        if c.outer_N is not None:
            out *= c.outer_N[:, None, None]
        if c.low_NG is not None:
            zero = form.low == "zero"
            low = -step * c.low_NG if zero else _times(c.low_NG, c.low_block_NB, form.group)
            out += low[:, :, None]
    return out.reshape(c.code_NK.shape)


def _times(small_NG: NDArray[Any], block_NB: Floats | None, group: int) -> Floats:
    """Whole numbers times their blocks' floats; floats as they are."""
    if block_NB is None:
        return small_NG.astype(np.float32)
    return small_NG.astype(np.float32) * np.repeat(block_NB, BLOCK // group, axis=1)
