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
        """4 bits in the form that holds them exactly, if there is one; steps of fp32 are tried as halves."""
        width, has_zeros = self.code_NK.shape[1], not isinstance(self.zero, int)
        for half in (self.half,) if self.half != "fp32" else ("fp16", "bf16", "fp32"):
            form = form_of(self.bits, self.group, width, half, has_zeros)
            if form in FORMS and holds(half, self.step_NG):
                group = FORMS[form].group
                zero = None if isinstance(self.zero, int) else self._regrouped(self.zero, group)
                return Coded(form, self.code_NK, self._regrouped(self.step_NG, group), low_NG=zero)
        return None

    def _regrouped(self, of_group: Array, group: int) -> Array:
        """Each said again for the smaller groups that its own is made of."""
        return np.repeat(of_group, self.group // group, axis=1)[:, : self.code_NK.shape[1] // group]

    def codes(self, encoding: str) -> Codes | None:
        """8 bits for `int8` (one bf16 step a row) or `group8` (an fp16 step each 32 inputs), if that holds
        them exactly."""
        if self.bits != 8 or self.zero != 128:
            return None
        step = self.step_NG
        if encoding == "int8" and step.shape[1] == 1 and holds("bf16", step):
            return Codes(self.code_NK ^ np.uint8(128), step, step)
        fits = self.group % 32 == 0 and self.code_NK.shape[1] % 64 == 0
        if encoding == "group8" and fits and holds("fp16", step):
            step = self._regrouped(step, 32)
            return Codes(self.code_NK, step, step)
        return None


def holds(half: str, numbers: Floats) -> bool:
    """Are these fp32 numbers all numbers of that type, too?"""
    with np.errstate(over="ignore"):
        if half == "fp16":
            back = numbers.astype(np.float16).astype(np.float32)
            return np.array_equal(back, numbers, equal_nan=True)
    if half == "bf16":
        return not (np.ascontiguousarray(numbers).view(np.uint32) & 0xFFFF).any()
    return True


def form_of(bits: int, group: int, width: int, half: str, has_zeros: bool) -> str:
    """The name of the form of kernels/palettes.py for such integers; "" for none."""
    fits = [g for g in GROUPS if width % g == 0 and group % g == 0]
    if bits != 4 or not half or not fits:
        return ""
    ending = "" if half == "fp16" else f"-{half}"
    return f"{'uint' if has_zeros else 'int'}4-{fits[0]}{ending}"


def encoding_of(bits: int, group: int, width: int, half: str, has_zeros: bool) -> str:
    """The encoding that holds such integers exactly, known from headers alone; where there is none, words
    for what they are."""
    if form := form_of(bits, group, width, half, has_zeros):
        return form
    if bits == 8 and not has_zeros:
        if half == "bf16" and group >= width:
            return "int8"
        if half == "fp16" and group % 32 == 0 and width % 64 == 0:
            return "group8"
    zeros = " and zero points" if has_zeros else ""
    return f"{bits}-bit integers in groups of {min(group, width)} with {half} steps{zeros}"
