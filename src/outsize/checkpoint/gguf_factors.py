"""Factors of whole weights that a GGUF has in tensors of their own: X.scale of X.weight, as NVFP4 has them.

llama.cpp multiplies what a weight gives by its factor, whatever the weight's type is: one number, or of a
stack of experts one for each (src/llama-model.cpp, "generic pass"). X.input_scale is there for activations
that are quantized before the product, which ours are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from outsize.checkpoint.checkpoint import Tensor


def with_factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every weight with its factor, which is no tensor of its own any more. One that does not fit stays where
    it is, and is refused with the other tensors that nobody uses."""
    out = dict(tensors)
    for name, tensor in tensors.items():
        plain, _, last = name.rpartition(".")
        weight = out.get(f"{plain}.weight")
        if weight is None:
            continue
        if last == "input_scale":
            del out[name]
        elif last == "scale" and _fits(tensor, weight):
            del out[name]
            out[weight.name] = replace(weight, factor=tensor)
    return out


def _fits(factor: Tensor, weight: Tensor) -> bool:
    due = weight.shape[:1] if len(weight.shape) == 3 else (1,)
    return factor.shape == due and factor.kind.length == 1 and factor.kind.is_readable
