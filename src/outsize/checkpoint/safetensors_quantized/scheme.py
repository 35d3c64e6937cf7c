"""How a config says that its weights are quantized, as far as outsize reads it; all else is refused by name.

Which modules are quantized, the stored tensors tell; a config's lists of modules say the same again. Settings
of activations and of the cache of keys and values change no weight: outsize keeps those in more bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from outsize.errors import UnsupportedError

Config = Mapping[str, object]
WAY_OUT = "use the original checkpoint (F32, F16 or BF16) or a GGUF of it, such as Q4_K_M or Q8_0"
NOTHING: tuple[object, ...] = (None, False, "", [], {}, 0)
BLOCK = 128  # rows and inputs that share a scale of FP8
FP8, AWQ, GPTQ, COMPRESSED = "fp8", "awq", "gptq", "compressed-tensors"
METHODS = (FP8, "fbgemm_fp8", AWQ, GPTQ, COMPRESSED)
FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mixed-precision", "dense",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weights:
    """What a config of compressed-tensors says of one kind of matrices. `group`: inputs that share a scale, 0
    for all of a row; `strategy`: what shares one."""

    bits: int
    is_float: bool
    strategy: str
    group: int = 0
    symmetric: bool = True


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the quantized matrices of a checkpoint are stored. `zero_shift`: what a stored zero point lacks;
    `blocks`: has FP8 a scale for each square of weights?"""

    method: str
    bits: int = 0
    group: int = 0
    symmetric: bool = False
    zero_shift: int = 0
    blocks: bool = False
    weights: tuple[Weights, ...] = ()


class _Reader:
    """Values of a config, in the types that they must have, or refused by name."""

    def __init__(self, values: Config, name: str, where: str) -> None:
        self.values, self.name, self.where = values, name, where

    def refuse(self, found: str) -> NoReturn:
        raise UnsupportedError(
            f"{self.where}: the weights are quantized with {self.name}, {found[:200]}, which outsize does "
            f"not read; {WAY_OUT}"
        )

    def get(self, *keys: str) -> object:
        """The first of these that is stated."""
        return next((self.values[k] for k in keys if self.values.get(k) is not None), None)

    def one_of(self, allowed: tuple[object, ...], *keys: str) -> object:
        """A value among these, letters in lower case."""
        value = self.get(*keys)
        value = value.lower() if isinstance(value, str) else value
        if not any(value == a and type(value) is type(a) for a in allowed):
            self.refuse(f"{keys[0]} {value!r}")
        return value

    def group(self, *keys: str) -> int:
        """Inputs of a group; 0 for all of a row."""
        value = self.get(*keys)
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or not (value == -1 or 0 < value < 1 << 24)
        ):
            self.refuse(f"{keys[0]} {value!r}")
        return max(0, value)

    def without(self, *keys: str) -> None:
        for key in keys:
            if self.values.get(key) not in NOTHING:
                self.refuse(f"{key} {self.values[key]!r}")


def scheme_of(values: Config, method: str, name: str, where: str) -> Scheme:
    """Of a quantization_config of one of METHODS. Raises UnsupportedError."""
    reader = _Reader(values, name, where)
    if method == AWQ:
        return _awq(reader)
    if method == GPTQ:
        return _gptq(reader)
    if method == COMPRESSED:
        return _compressed(reader)
    return _fp8(reader)


def _awq(reader: _Reader) -> Scheme:
    reader.one_of((4,), "bits", "w_bit")
    reader.one_of((True, None), "zero_point")
    reader.one_of(("gemm", None), "version", "format", "checkpoint_format")
    if reader.get("backend") == "llm-awq":
        reader.refuse("backend 'llm-awq'")
    return Scheme(AWQ, 4, reader.group("group_size", "q_group_size"))


def _gptq(reader: _Reader) -> Scheme:
    bits = 8 if reader.one_of((4, 8), "bits", "w_bit") == 8 else 4
    form = reader.one_of((GPTQ, "gptq_v2", None), "checkpoint_format", "format")
    reader.one_of((None, "int32"), "pack_dtype")
    reader.without("is_marlin_format", "rotation", "adapter")
    _refuse_dynamic(reader)
    group = reader.group("group_size", "q_group_size")
    if reader.one_of((True, False, None), "desc_act") and group:
        reader.refuse("its inputs in the order of activations (desc_act)")
    symmetric = reader.one_of((True, False, None), "sym") is True
    return Scheme(GPTQ, bits, group, symmetric, zero_shift=int(form != "gptq_v2"))


def _refuse_dynamic(reader: _Reader) -> None:
    """Some modules otherwise than the rest; those that are left out ("-:") are stored as they were."""
    rules = reader.get("dynamic")
    if isinstance(rules, dict) and any(not str(rule).startswith("-:") for rule in rules):
        reader.refuse("some modules otherwise than the rest (dynamic)")


def _fp8(reader: _Reader) -> Scheme:
    size = reader.get("weight_block_size")
    if size not in (None, [BLOCK, BLOCK]):
        reader.refuse(f"weight_block_size {size!r}")
    reader.one_of((None, "e4m3", "float8_e4m3fn"), "fmt", "fp8_format")
    reader.one_of((None, "fp8"), "expert_dtype")
    return Scheme(FP8, 8, blocks=size is not None)


def _compressed(reader: _Reader) -> Scheme:
    reader.one_of((*FORMATS, None), "format")
    reader.without("transform_config")
    sparse = reader.get("sparsity_config", "moe_sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format") not in (None, "dense"):
        reader.refuse(f"sparsity_config format {sparse.get('format')!r}")
    groups = reader.get("config_groups")
    if not isinstance(groups, dict):
        reader.refuse("without config_groups")
    found = [_weights(reader, group) for group in groups.values()]
    return Scheme(COMPRESSED, weights=tuple(dict.fromkeys(w for w in found if w is not None)))


def _weights(reader: _Reader, group: object) -> Weights | None:
    """What a group of config_groups says of weights, if anything."""
    if not isinstance(group, dict):
        reader.refuse(f"config_groups {group!r}")
    if group.get("weights") is None:
        return None
    if not isinstance(group["weights"], dict):
        reader.refuse(f"weights {group['weights']!r}")
    inner = _Reader({**group["weights"], "format": group.get("format")}, reader.name, reader.where)
    inner.one_of((*FORMATS, None), "format")
    inner.without("dynamic")
    bits, is_float = inner.get("num_bits"), inner.one_of(("int", "float"), "type") == "float"
    if not isinstance(bits, int) or (bits, is_float) not in (
        (4, False),
        (8, False),
        (8, True),
        (4, True),
    ):
        inner.refuse(f"{'floats' if is_float else 'integers'} of {bits!r} bits")
    if inner.one_of((None, False, "weight", "static", "group", "dynamic"), "actorder") in (
        "group",
        "dynamic",
    ):
        inner.refuse("its inputs in the order of activations (actorder)")
    size = inner.group("group_size") if inner.get("group_size") is not None else 0
    symmetric = inner.one_of((True, False, None), "symmetric") is not False
    if is_float and not symmetric:
        inner.refuse("floats with zero points")
    return Weights(bits, is_float, _strategy(inner, size, is_float), size, symmetric)


def _strategy(inner: _Reader, size: int, is_float: bool) -> str:
    """What shares a scale: tensor, channel, group, tensor_group (with one scale for all, too) or block."""
    default = "group" if size else "tensor" if inner.get("group_size") is None else "channel"
    known = ("tensor", "channel", "group", "tensor_group", "block", None)
    found = str(inner.one_of(known, "strategy") or default)
    if found == "block" and (inner.get("block_structure") != [BLOCK, BLOCK] or not is_float):
        inner.refuse(f"block_structure {inner.get('block_structure')!r}")
    if found.endswith("group") != bool(size):
        inner.refuse(f"strategy {found!r} with group_size {size}")
    return found
