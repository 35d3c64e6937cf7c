"""Which bundles of neurons will fire for a token: a small model of each layer's gate, always in memory.

A predictor is a file of this folder, found by its name: `fit(sample, size)` makes its matrices from a layer's
activations, `scores(maps, x)` gives a bundle's score for a token; a bundle whose score is above the layer's
threshold is fetched and computed.

Law: a token's scores depend on nothing but the token: each row is scored alone, by products that do not
depend on threads, and sums in one order. Shapes: T tokens, D width, F neurons, N bundles, R rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from outsize import registry
from outsize.errors import OptionError
from outsize.kernels.plain import activation_of
from outsize.model import predictors as package
from outsize.model.layers import Linear

IMPORTANCE = "importance"  # the vector (F,) of what a neuron's gate is worth
BIAS = "bias"  # the vector (F,) that is added to the gate


@dataclass(frozen=True, slots=True)
class Sample:
    """What a predictor is fitted to, of one layer."""

    x_TD: Tensor  # what enters the feed-forward, fp32
    energy_TN: Tensor  # squared norm of what each bundle adds, about
    gate_FD: Tensor
    up_F: Tensor  # root mean square of the up-projection
    down_F: Tensor  # norm of each neuron's column
    share: float  # of the bundles that are to be computed
    bias_F: Tensor | None = None  # of the gate


@dataclass(frozen=True, slots=True)
class Fitted:
    """A predictor of one layer: matrices, each with the encoding that it is kept in, and vectors (fp32)."""

    matrices: Mapping[str, tuple[str, Tensor]]
    vectors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Maps:
    """The same, to be run."""

    matrices: Mapping[str, Linear]
    vectors: Mapping[str, Tensor]
    activation: str
    bundle: int


def by_name(spec: str) -> tuple[ModuleType, str]:
    """A predictor's module, and the size that a spec as `svd:64` names ("" for none). Raises
    UnsupportedError."""
    name, _, size = spec.partition(":")
    known = [n for n in registry.names(package) if n not in ("choose", "predictor")]
    return registry.module(package, name, "predictor", known), size


def whole_size(spec: str, text: str, default: int, least: int, most: int) -> int:
    """The whole number in a spec. Raises OptionError."""
    if not text:
        return default
    if not text.isdecimal() or not least <= int(text) <= most:
        raise OptionError(
            f"predictor {spec}:{text}: a whole number from {least} to {most} is expected after the colon"
        )
    return int(text)


def worth(sample: Sample) -> dict[str, Tensor]:
    """The vectors of predictors that say what the gate gives."""
    bias = {} if sample.bias_F is None else {BIAS: sample.bias_F}
    return {IMPORTANCE: sample.up_F * sample.down_F, **bias}


def row_by_row(maps: Maps, scores: Callable[[Maps, Tensor], Tensor], x_TD: Tensor) -> Tensor:
    """(T, N) fp32, each row's as if it were alone."""
    return torch.cat([scores(maps, x) for x in x_TD.split(1)])


def by_gate(maps: Maps, gate_TF: Tensor) -> Tensor:
    """(T, N): scores of (about) what the gate gives, before its bias, which is added as the feed-forward adds
    it. With importances, the expected energy of a bundle; without, how much of it is on, so that 0 says that
    none is."""
    if BIAS in maps.vectors:
        gate_TF = (gate_TF + maps.vectors[BIAS]).to(gate_TF.dtype)
    active = activation_of(maps.activation)(gate_TF.float())
    importance = maps.vectors.get(IMPORTANCE)
    if importance is None:
        return halved(active.abs(), maps.bundle)
    return halved((active * importance).square(), maps.bundle)


def halved(x_TF: Tensor, bundle: int) -> Tensor:
    """(T, N): sums over bundles, in one order whatever the shape."""
    x = x_TF.unflatten(1, (-1, bundle))
    while x.shape[2] > 1:
        half = x.shape[2] // 2
        rest = x[:, :, 2 * half :]
        x = x[:, :, :half] + x[:, :, half : 2 * half]
        if rest.shape[2]:
            x = torch.cat([x, rest], dim=2)
    sums: Tensor = x[:, :, 0]
    return sums
