"""The gate itself, resident in few bits (`gate:3`), or as the pack has it (`gate:exact`): for a ReLU
model the latter misses nothing, and the answer is the dense model's."""

from __future__ import annotations

from torch import Tensor

from outsize.errors import OptionError
from outsize.kernels.plain import FATRELU
from outsize.model.predictors.predictor import Fitted, Maps, Sample, by_gate, worth

BITS = ("2", "3", "4", "5", "6", "8")
EXACT = "exact"
ZERO = "relu", "relu2", FATRELU  # activations that give 0


def check(size: str) -> None:
    """Raises OptionError for a size that is none."""
    if size and size not in (*BITS, EXACT):
        raise OptionError(f"predictor gate:{size}: {', '.join(BITS)} bits or {EXACT} are expected")


def fit(sample: Sample, size: str) -> Fitted:
    """No matrices where the pack's own gate is meant."""
    if size == EXACT:
        return Fitted({}, worth(sample))
    kind = encoding_of(size or "3", sample.gate_FD.shape[1])
    return Fitted({"gate": (kind, sample.gate_FD)}, worth(sample))


def is_exact(spec: str, activation: str) -> bool:
    """Does this predictor miss nothing of a model with this activation?"""
    return spec == f"gate:{EXACT}" and activation.partition(":")[0] in ZERO


def encoding_of(bits: str, width: int) -> str:
    """What a gate of so many bits is kept in."""
    return "int8" if bits == "8" or width % 64 else f"palette{bits}-fp16"


def scores(maps: Maps, x_TD: Tensor) -> Tensor:
    return by_gate(maps, maps.matrices["gate"](x_TD, False))
