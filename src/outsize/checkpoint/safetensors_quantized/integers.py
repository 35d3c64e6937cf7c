"""Integers with a step, and perhaps a zero point, for each group of inputs, as AWQ, GPTQ and
compressed-tensors keep them; and which encoding holds them exactly.

    w[n, k] = (code[n, k] - zero[n, k / group]) * step[n, k / group]

Shapes: N rows, K inputs, G groups (the last may be shorter).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from outsize.checkpoint.coded import Bytes, Coded, Floats
from outsize.checkpoint.ggml import Codes
from outsize.checkpoint.safetensors_quantized import stored
from outsize.checkpoint.safetensors_quantized.stored import Array
from outsize.kernels.palettes import FORMS

GROUPS = (256, 128, 64, 32)  # of inputs that share a step, in a palette
Q8 = "q8_0"  # 8 bits in groups of 32 with a step of fp16


@dataclass(frozen=True, slots=True)
class Integers:
    """A matrix, or some of its rows. `half`: "fp16", "bf16" or "fp32", the type of the steps, here in fp32;
    `zero`: one for all groups, or (N, G)."""

    bits: int
    group: int
    half: str
    code_NK: Bytes
    step_NG: Floats
    zero: int | Bytes

    def floats(self) -> Floats:
        """fp32; one rounding for steps that are fp32, none for halves."""
        out: Floats = self.code_NK.astype(np.float32)
        if isinstance(self.zero, int):
            out -= self.zero
        else:
            stored.each_group(np.subtract, out, self.zero, self.group)
        stored.each_group(np.multiply, out, self.step_NG, self.group)
        return out

    def coded(self) -> Coded | None:
        """In the form that holds them exactly, if there is one."""
        width, has_zeros = self.code_NK.shape[1], not isinstance(self.zero, int)
        form = form_of(self.bits, self.group, width, self.half, has_zeros)
        if not form:
            return None
        group = FORMS[form].group
        zero = None if isinstance(self.zero, int) else self._regrouped(self.zero, group)
        return Coded(form, self.code_NK, self._regrouped(self.step_NG, group), low_NG=zero)

    def _regrouped(self, of_group: Array, group: int) -> Array:
        """Each said again for the smaller groups that its own is made of."""
        return np.repeat(of_group, self.group // group, axis=1)[:, : self.code_NK.shape[1] // group]

    def codes(self, encoding: str) -> Codes | None:
        """8 bits for `int8`, which has a bf16 step a row, if that holds them exactly."""
        fits = encoding == "int8" and self.bits == 8 and self.zero == 128
        if not fits or self.step_NG.shape[1] != 1 or self.half != "bf16":
            return None
        return Codes(self.code_NK ^ np.uint8(128), self.step_NG, self.step_NG)


def form_of(bits: int, group: int, width: int, half: str, has_zeros: bool) -> str:
    """The name of the form of kernels/palettes.py for such integers; "" for none."""
    sign, ending = "uint" if has_zeros else "int", "" if half == "fp16" else f"-{half}"
    fits = [g for g in GROUPS if width % g == 0 and group % g == 0]
    names = [
        Q8 if (bits, g, half, has_zeros) == (8, 32, "fp16", False) else f"{sign}{bits}-{g}{ending}"
        for g in fits
    ]
    return next((name for name in names if name in FORMS), "")


def encoding_of(bits: int, group: int, width: int, half: str, has_zeros: bool) -> str:
    """The encoding that holds such integers exactly, known from headers alone; where there is none, words
    for what they are."""
    if form := form_of(bits, group, width, half, has_zeros):
        return form
    if bits == 8 and not has_zeros and half == "bf16" and group >= width:
        return "int8"
    zeros = " and zero points" if has_zeros else ""
    return f"{bits}-bit integers in groups of {min(group, width)} with {half} steps{zeros}"
