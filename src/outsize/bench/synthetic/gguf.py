"""Writes a model with random weights as a GGUF: layers Q4_0, embedding and head Q8_0."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from outsize.bench.synthetic.shapes import ARCHITECTURES, Size, gguf_values, recipe, tensors
from outsize.errors import OptionError

BLOCK = 32
CHUNK = 32 << 20  # weights made at once


def blocks(random: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:  # type: ignore[type-arg]
    """Stored bytes of a random tensor, with weights of about 1 / sqrt(inputs)."""
    if kind == "F32":
        mean, spread = (1.0, 0.05) if len(shape) == 1 else (0.0, 1 / math.sqrt(shape[-1]))
        return (mean + spread * random.standard_normal(shape)).astype(np.float32)
    size = 16 if kind == "Q4_0" else 32
    spread = 4.6 if kind == "Q4_0" else 74.0  # of evenly drawn codes
    count = math.prod(shape) // BLOCK
    out = np.empty((count, 2 + size), np.uint8)
    scale = np.full(count, 1 / (math.sqrt(shape[-1]) * spread), np.float16)
    out[:, :2] = scale.view(np.uint8).reshape(count, 2)
    for start in range(0, count, CHUNK // BLOCK):
        part = out[start : start + CHUNK // BLOCK, 2:]
        part[:] = np.frombuffer(random.bytes(part.size), np.uint8).reshape(part.shape)
    return out.reshape(*shape[:-1], -1)


Change = Callable[[str, np.ndarray], np.ndarray]  # type: ignore[type-arg]


def write(
    path: Path, family: str, size: Size, seed: int, change: Change = lambda name, stored: stored
) -> int:
    """The GGUF; its bytes. `change`: a tensor's stored bytes, by its name in the file, as they shall be."""
    try:
        gguf: Any = import_module("gguf")
    except ImportError:
        raise OptionError("this needs the package 'gguf': pip install 'outsize[bench]'") from None
    made, writer = recipe(family, size), gguf.GGUFWriter(path, ARCHITECTURES.get(family, family))
    _config(writer, gguf_values(family, size))
    _tokenizer(writer, size.vocab)
    listed = list(tensors(made))
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
        writer.write_tensor_data(change(name, blocks(random, shape, kind)))
    writer.close()
    return path.stat().st_size


def _stored(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    return *shape[:-1], shape[-1] // BLOCK * (18 if kind == "Q4_0" else 34)


def _config(writer: Any, values: dict[str, object]) -> None:
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
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
