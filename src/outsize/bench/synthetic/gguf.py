"""Writes a model with random weights as a GGUF: layers Q4_0, embedding and head Q8_0, or Q4_K_M's mix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from outsize.bench.synthetic.shapes import (
    ARCHITECTURES,
    MIXES,
    Size,
    gguf_values,
    recipe,
    tensors,
)
from outsize.errors import OptionError

CHUNK = 32 << 20  # weights made at once


@dataclass(frozen=True, slots=True)
class Type:
    """A GGUF type: weights and bytes of a block, where its fp16 scales are, and how widely its weights spread
    where these are 1 and all other bytes are evenly drawn."""

    weights: int
    nbytes: int
    spread: float
    scale: int = 0
    low: int | None = None  # Q4_K's scale of what it subtracts: 7.5 of the other make a mean of 0


FADES = ".ssm_a"  # decays, which are below 0
TYPES = {
    "Q4_0": Type(32, 18, 4.6), "Q8_0": Type(32, 34, 74.0), "Q4_K": Type(256, 144, 258.0, low=2),
    "Q6_K": Type(256, 210, 1365.0, scale=208), "Q3_K": Type(256, 110, 43.0, scale=108),
}  # fmt: skip


def blocks(random: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:  # type: ignore[type-arg]
    """Stored bytes of a random tensor, with weights of about 1 / sqrt(inputs)."""
    if kind == "F32":
        mean, spread = (1.0, 0.05) if len(shape) == 1 else (0.0, 1 / math.sqrt(shape[-1]))
        return (mean + spread * random.standard_normal(shape)).astype(np.float32)
    type = TYPES[kind]
    count = math.prod(shape) // type.weights
    out = np.empty((count, type.nbytes), np.uint8)
    scale = 1 / (math.sqrt(shape[-1]) * type.spread)
    for start in range(0, count, CHUNK // type.weights):
        part = out[start : start + CHUNK // type.weights]
        part[:] = np.frombuffer(random.bytes(part.size), np.uint8).reshape(part.shape)
        _put(part, type.scale, scale)
        if type.low is not None:
            _put(part, type.low, 7.5 * scale)
    return out.reshape(*shape[:-1], -1)


def _put(blocks: np.ndarray, at: int, scale: float) -> None:  # type: ignore[type-arg]
    blocks[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)


Change = Callable[[str, np.ndarray], np.ndarray]  # type: ignore[type-arg]


def write(
    path: Path,
    family: str,
    size: Size,
    seed: int,
    change: Change = lambda name, stored: stored,
    types: str = "q4_0",
) -> int:
    """The GGUF; its bytes. `change`: a tensor's stored bytes, by its name in the file, as they shall be;
    `types`: one of MIXES. Raises OptionError where rows are no whole blocks of them."""
    try:
        gguf: Any = import_module("gguf")
    except ImportError:
        raise OptionError("this needs the package 'gguf': pip install 'outsize[bench]'") from None
    listed = _listed(family, size, types)
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(family, family))
    _config(writer, gguf_values(family, size))
    _tokenizer(writer, size.vocab)
    for name, shape, kind in listed:
        type = gguf.GGMLQuantizationType[kind]
        dtype, stored = (np.float32, shape) if kind == "F32" else (np.uint8, _stored(shape, kind))
        nbytes = math.prod(stored) * np.dtype(dtype).itemsize
        writer.add_tensor_info(name, stored, np.dtype(dtype), nbytes, type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(seed)
    for name, shape, kind in listed:
        made = blocks(random, shape, kind)
        writer.write_tensor_data(change(name, -made if name.endswith(FADES) else made))
    writer.close()
    return path.stat().st_size


def _stored(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    return *shape[:-1], shape[-1] // TYPES[kind].weights * TYPES[kind].nbytes


def _listed(family: str, size: Size, types: str) -> list[tuple[str, tuple[int, ...], str]]:
    """The tensors, checked."""
    if types not in MIXES:
        raise OptionError(f"types {types!r} are not known; known are {', '.join(MIXES)}")
    listed = list(tensors(recipe(family, size), types))
    for name, shape, kind in listed:
        if kind != "F32" and shape[-1] % (block := TYPES[kind].weights):
            raise OptionError(
                f"{name} has rows of {shape[-1]}, {kind} has blocks of {block}; take q4_0"
            )
    return listed


def _config(writer: Any, values: dict[str, object]) -> None:
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_float32(key, value)


def _tokenizer(writer: Any, vocab: int) -> None:
    """Bytes, and names that no text yields."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    fillers = [f"<|{i}|>" for i in range(vocab - len(alphabet) - 2)]
    writer.add_token_list([*alphabet, "Ġa", *fillers, "<|end|>"])
    writer.add_token_types([1] * (vocab - 1) + [3])
    writer.add_token_merges(["Ġ a"])
    writer.add_eos_token_id(vocab - 1)
