"""`outsize bench synthetic`: a model of any family and size with random weights, to measure real reads.

It is written as a GGUF (layers Q4_0, embedding and head Q8_0) with the gguf package, or as a folder of
safetensors (bf16), and then packed like any other, so that every engine can be timed on the same weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from outsize import registry
from outsize.errors import OptionError
from outsize.family.config import GGUF_KEYS, Config
from outsize.family.find import families
from outsize.model_config import Description, Recipe
from outsize.pack import fetch

BLOCK = 32
CHUNK = 32 << 20  # weights made at once


@dataclass(frozen=True, slots=True)
class Size:
    """The numbers that a model's bytes follow from."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int = 32_000
    context: int = 4096
    head_dim: int = 0  # 0: width / heads
    experts: int = 0
    used: int = 0

    @property
    def head(self) -> int:
        return self.head_dim or self.width // self.heads


SIZES = {
    "tiny": Size(2, 256, 512, 4, 2, 512, 512),
    "0.5b": Size(24, 896, 4864, 14, 2, 151_936),
    "1.5b": Size(28, 1536, 8960, 12, 2, 151_936),
    "2b": Size(24, 2560, 6912, 20, 20),
    "3b": Size(28, 3072, 8192, 24, 8, 128_256),
    "7b": Size(32, 4096, 11_008, 32, 32),
    "8b": Size(32, 4096, 14_336, 32, 8, 128_256),
    "13b": Size(40, 5120, 13_824, 40, 40),
    "tiny-moe": Size(2, 256, 128, 4, 2, 512, 512, experts=16, used=4),
    "7b-a1b": Size(16, 2048, 1024, 16, 16, 50_304, experts=64, used=8),
    "30b-a3b": Size(48, 2048, 768, 32, 4, 151_936, head_dim=128, experts=128, used=8),
    "70b": Size(80, 8192, 28_672, 64, 8, 128_256),
}


ARCHITECTURES = {"qwen3_moe": "qwen3moe", "mixtral": "llama", "gpt_oss": "gpt-oss"}  # in a GGUF


def values(size: Size) -> dict[str, object]:
    """The config, under Hugging Face's names."""
    mixed: dict[str, object] = {}
    if size.experts:
        mixed = {
            "num_local_experts": size.experts,
            "num_experts_per_tok": size.used,
            "moe_intermediate_size": size.ffn,
        }
    return mixed | {
        "num_hidden_layers": size.layers,
        "hidden_size": size.width,
        "intermediate_size": size.ffn,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": size.context,
    }


def recipe(family: str, size: Size, format: str = "gguf") -> Recipe:
    """As the family describes a checkpoint of these numbers. Raises UnsupportedError."""
    import outsize.family as package

    made = registry.module(package, family, "architecture", families())
    keys, architecture = {**made.DEFAULTS, **values(size), "vocab_size": size.vocab}, family
    if format == "gguf":
        architecture = ARCHITECTURES.get(family, family)
        keys = {f"{architecture}.{GGUF_KEYS[k]}": v for k, v in values(size).items()}
    names = frozenset({"output.weight", "lm_head.weight", "model.embed_tokens.weight"})
    found: Recipe = made.recipe(Config(format, architecture, keys, names, size.vocab))
    if (found.description.mixture is None) != (size.experts == 0):
        raise OptionError(f"{family} and this size disagree about experts; name another of either")
    return found


def shapes(d: Description) -> dict[str, tuple[int, ...]]:
    """Our tensor names and their shapes, of one layer; {i} is not filled in."""
    q, kv = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    out: dict[str, tuple[int, ...]] = {
        "attn_norm": (d.width,),
        "q": (q, d.width),
        "k": (kv, d.width),
        "v": (kv, d.width),
        "o": (d.width, q),
        "ffn_norm": (d.width,),
    }
    if d.mixture is None:
        up, down = (d.ffn_width, d.width), (d.width, d.ffn_width)
        out |= {"gate": up, "up": up, "down": down}
    if d.o_bias:
        out |= {"o_bias": (d.width,)}
    if d.sinks:
        out |= {"sinks": (d.num_heads,)}
    if d.qk_norm_whole:
        out |= {"q_norm": (q,), "k_norm": (kv,)}
    if d.qkv_bias:
        out |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if d.qk_norm:
        out |= {"q_norm": (d.head_dim,), "k_norm": (d.head_dim,)}
    if d.post_norm:
        out |= {"attn_post_norm": (d.width,), "ffn_post_norm": (d.width,)}
    return out


def tensors(recipe: Recipe) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(foreign name, shape, GGUF type) of every tensor."""
    d, names = recipe.description, recipe.names
    yield names["embed"], (d.vocab_size, d.width), "Q8_0"
    yield names["head"], (d.vocab_size, d.width), "Q8_0"
    yield names["final_norm"], (d.width,), "F32"
    for i in range(d.num_layers):
        for name, shape in shapes(d).items():
            foreign = names[name].replace("{i}", str(i))
            yield foreign, shape, "Q4_0" if len(shape) == 2 else "F32"
        if d.mixture is not None:
            yield from _experts(recipe, i, d.mixture.count)


def _experts(recipe: Recipe, layer: int, count: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """A router and its experts: stacked in a GGUF, each by itself elsewhere."""
    d, names = recipe.description, recipe.names
    up, down = (d.ffn_width, d.width), (d.width, d.ffn_width)
    yield names["router"].replace("{i}", str(layer)), (count, d.width), "F32"
    if d.mixture is not None and d.mixture.bias:
        yield names["router_bias"].replace("{i}", str(layer)), (count,), "F32"
        for name, width in (("gate", d.ffn_width), ("up", d.ffn_width), ("down", d.width)):
            foreign = names[f"expert_{name}_bias"].replace("{i}", str(layer))
            yield foreign, (count, width), "F32"
    for name, shape in (("expert_gate", up), ("expert_up", up), ("expert_down", down)):
        foreign = names[name].replace("{i}", str(layer))
        if "{e}" in foreign:
            yield from ((foreign.replace("{e}", str(e)), shape, "Q4_0") for e in range(count))
        else:
            yield foreign, (count, *shape), "Q4_0"


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
    _config(writer, size)
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


def _config(writer: Any, size: Size) -> None:
    writer.add_block_count(size.layers)
    writer.add_context_length(size.context)
    writer.add_embedding_length(size.width)
    writer.add_feed_forward_length(size.ffn)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_key_length(size.head)
    writer.add_value_length(size.head)
    writer.add_rope_dimension_count(size.head)
    if size.experts:
        writer.add_expert_count(size.experts)
        writer.add_expert_used_count(size.used)
        writer.add_expert_feed_forward_length(size.ffn)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)


def _tokenizer(writer: Any, vocab: int) -> None:
    """Bytes, and names that no text yields."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    fillers = [f"<|{i}|>" for i in range(vocab - len(alphabet) - 2)]
    writer.add_token_list([*alphabet, "Ġa", *fillers, "<|end|>"])
    writer.add_token_types([1] * (len(alphabet) + 1) + [1] * len(fillers) + [3])
    writer.add_token_merges(["Ġ a"])
    writer.add_eos_token_id(vocab - 1)


def show(path: Path, family: str, size: str, seed: int, encoding: str, quiet: bool) -> None:
    """Write, pack, and print one JSON object."""
    if size not in SIZES:
        raise OptionError(f"size {size!r} is not known; known are {', '.join(SIZES)}")
    if path.exists():
        raise OptionError(f"{path} is there already; give a new name, FILE.gguf or a folder's")
    if not quiet:
        fetch.say(f"writing a {family} of size {size} with random weights into {path}")
    from outsize.bench.synthetic.folder import write_folder

    make = write if path.suffix == ".gguf" else write_folder
    written = make(path, family, SIZES[size], seed)
    pack = fetch.pack(str(path), encoding=encoding, quiet=quiet)
    print(
        json.dumps({
            "model": str(path), "model_bytes": written, "pack": pack.path.name,
            "pack_bytes": pack.size, "encodings": pack.encodings, "family": family, "size": size,
            "seed": seed,
        })
    )  # fmt: skip
