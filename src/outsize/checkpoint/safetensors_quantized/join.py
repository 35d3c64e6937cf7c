"""The stored tensors of quantized safetensors -> the matrices of the model, under its own names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from outsize.checkpoint.checkpoint import Tensor
from outsize.checkpoint.read_json import fail
from outsize.checkpoint.safetensors_quantized import awq, fp4, fp8, gptq, packed
from outsize.checkpoint.safetensors_quantized.scheme import (
    AWQ,
    BLOCK,
    COMPRESSED,
    FP8,
    GPTQ,
    Scheme,
    Weights,
)  # fmt: skip
from outsize.errors import UnsupportedError

Parts = dict[str, Tensor]  # by the last part of their names
WEIGHT = "weight"
INVERSE = "weight_scale_inv"
# Scales of activations, and of keys and values in their cache: outsize keeps both in more bits.
SPARES = {
    *(f"{what}_{of}" for what in ("input", "output", "k", "v", "q")
      for of in ("scale", "zero_point", "global_scale")),
    "input_scale_ub", "activation_scale", "kv_scale",
}  # fmt: skip
# By method: the name that only quantized modules have, and those that belong to one.
NAMES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    AWQ: (("qweight",), awq.PARTS),
    GPTQ: (("qweight",), (*gptq.PARTS, gptq.GROUPS)),
    FP8: ((WEIGHT,), (WEIGHT, INVERSE, packed.SCALE)),
    COMPRESSED: ((WEIGHT, packed.CODES), (WEIGHT, packed.CODES, packed.SCALE, packed.ZERO, packed.SHAPE,
                                          packed.GROUPS, fp4.GLOBAL)),
}  # fmt: skip


def join(tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[dict[str, Tensor], frozenset[str]]:
    """All tensors, those of a quantized matrix as one under the name that it would have otherwise; and the
    names of such matrices' biases. Nothing is read. Raises CheckpointError, UnsupportedError."""
    first, names = NAMES[scheme.method]
    make = _MAKE[scheme.method]
    rest = {
        k: t for k, t in tensors.items() if _last(k) not in SPARES or scheme.method in (AWQ, GPTQ)
    }
    stems = [k.rpartition(".")[0] for k, t in rest.items() if _last(k) in first and _is_coded(t)]
    made: dict[str, Tensor] = {}
    for stem in stems:
        parts = {n: rest[f"{stem}.{n}"] for n in names if f"{stem}.{n}" in rest}
        name = f"{stem}.{WEIGHT}"
        if (
            name in made
            or (name in rest and first[0] != WEIGHT)
            or {WEIGHT, packed.CODES} <= parts.keys()
        ):
            raise fail(next(iter(parts.values())).path, f"tensor {name!r} is there in two forms")
        made[name] = make(name, parts, scheme)
        for part in parts:
            del rest[f"{stem}.{part}"]
    return rest | made, frozenset(f"{stem}.bias" for stem in stems)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_coded(tensor: Tensor) -> bool:
    return tensor.kind.name in ("I8", "I32", "U8", "F8_E4M3")


def _need(parts: Parts, *names: str) -> None:
    missing = [n for n in names if n not in parts]
    if missing:
        any_part = next(iter(parts.values()))
        stem = any_part.name.rpartition(".")[0]
        raise fail(any_part.path, f"tensor {f'{stem}.{missing[0]}'!r} is missing")


def _awq(name: str, parts: Parts, scheme: Scheme) -> Tensor:
    _need(parts, *awq.PARTS)
    return awq.join(name, parts, scheme)


def _gptq(name: str, parts: Parts, scheme: Scheme) -> Tensor:
    _need(parts, *gptq.PARTS)
    return gptq.join(name, parts, scheme)


def _fp8(name: str, parts: Parts, scheme: Scheme) -> Tensor:
    if INVERSE not in parts:
        _need(parts, packed.SCALE)
    scale = parts.get(INVERSE) or parts[packed.SCALE]
    return fp8.join(name, parts[WEIGHT], scale, fp8.shared_by(scale, scheme.blocks))


def _compressed(name: str, parts: Parts, scheme: Scheme) -> Tensor:
    """The one kind of the config's that these tensors can be. Raises UnsupportedError."""
    _need(parts, packed.SCALE)
    codes = parts.get(packed.CODES) or parts[WEIGHT]
    found = [w for w in scheme.weights if _fits(w, parts)]
    found = [w for w in found if not w.symmetric] or found
    if len(found) != 1:
        shapes = f"{codes.kind.name} {codes.shape}, scales {parts[packed.SCALE].shape}"
        raise UnsupportedError(
            f"{codes.path.name}: tensor {codes.name!r} ({shapes}) fits {len(found) or 'none'} of the "
            f"{len(scheme.weights)} kinds of weights in config_groups; use a GGUF of the model"
        )
    if codes.kind.name == "U8":
        if found[0].strategy == "tensor_group":
            _need(parts, fp4.GLOBAL)
        return fp4.join(name, parts, found[0])
    if codes.kind.name == "F8_E4M3":
        return fp8.join(name, codes, parts[packed.SCALE], found[0])
    return packed.join(name, parts, found[0])


def _fits(weights: Weights, parts: Parts) -> bool:
    """May these tensors hold such weights, by their types and the scales' shape?"""
    codes, scale = parts.get(packed.CODES) or parts[WEIGHT], parts[packed.SCALE].shape
    kind, rest = codes.kind.name, (weights.bits, weights.is_float)
    if kind == "F8_E4M3" and rest == (8, True):
        return _fits_fp8(weights, codes.shape, scale)
    if kind == "U8" and rest == (4, True):
        return {"tensor_group": 16, "group": 32}.get(weights.strategy) == weights.group
    if weights.is_float or kind not in ("I8", "I32"):
        return False
    if not weights.symmetric and packed.ZERO not in parts:
        return False
    return scale in packed.scale_shapes(parts, weights)


def _fits_fp8(weights: Weights, shape: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    if weights.strategy == "group":
        return weights.group % BLOCK == 0 and scale == (shape[0], -(-shape[-1] // weights.group))
    if weights.strategy == "tensor":
        return scale in ((), (1,), (1, 1))
    return weights.strategy in ("channel", "block")


_MAKE: Mapping[str, Callable[[str, Parts, Scheme], Tensor]] = {
    AWQ: _awq, GPTQ: _gptq, FP8: _fp8, COMPRESSED: _compressed,
}  # fmt: skip
