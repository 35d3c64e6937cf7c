"""Sizes of synthetic models, and the tensors that a model of a family and size has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import outsize.family as family_folder
from outsize import registry
from outsize.errors import OptionError
from outsize.family.config import GGUF_KEYS, Config
from outsize.family.find import families
from outsize.model_config import Description, Recipe


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
# Types of layers' matrices, the embedding and the head.
MIXES = {
    "q4_0": ("Q4_0", "Q8_0", "Q8_0"),
    "q4_k_m": ("Q4_K", "Q4_K", "Q6_K"),
    "q3_k": ("Q3_K", "Q8_0", "Q8_0"),
}
ARCHITECTURES = {"qwen3_moe": "qwen3moe", "mixtral": "llama", "gpt_oss": "gpt-oss"}  # in a GGUF


def values(size: Size) -> dict[str, object]:
    """The config, under Hugging Face's names."""
    mixed = {
        "num_local_experts": size.experts, "num_experts_per_tok": size.used,
        "moe_intermediate_size": size.ffn,
    }  # fmt: skip
    return (mixed if size.experts else {}) | {
        "num_hidden_layers": size.layers, "hidden_size": size.width, "intermediate_size": size.ffn,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "head_dim": size.head,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "max_position_embeddings": size.context,
    }  # fmt: skip


def recipe(family: str, size: Size, format: str = "gguf") -> Recipe:
    """As the family describes a checkpoint of these numbers. Raises UnsupportedError."""
    made = registry.module(family_folder, family, "architecture", families())
    keys, architecture = {**made.DEFAULTS, **values(size), "vocab_size": size.vocab}, family
    if format == "gguf":
        architecture = ARCHITECTURES.get(family, family)
        keys = {f"{architecture}.{GGUF_KEYS[k]}": v for k, v in values(size).items()}
    names = frozenset({"output.weight", "lm_head.weight", "model.embed_tokens.weight"})
    found: Recipe = made.recipe(Config(format, architecture, keys, names, size.vocab))
    if (found.description.mixture is None) != (size.experts == 0):
        raise OptionError(f"{family} and this size disagree about experts; name another of either")
    return found


def tensors(recipe: Recipe, types: str = "q4_0") -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(foreign name, shape, GGUF type) of every tensor, with the types of a mix: one of MIXES (q4_k_m with
    Q4_K for experts' down, too)."""
    d, names = recipe.description, recipe.names
    most, embed, head = MIXES[types]
    yield names["embed"], (d.vocab_size, d.width), embed
    yield names["head"], (d.vocab_size, d.width), head
    yield names["final_norm"], (d.width,), "F32"
    for i in range(d.num_layers):
        for name, shape in shapes(d).items():
            more = types == "q4_k_m" and name in ("v", "down") and _more_bits(i, d.num_layers)
            kind = "F32" if len(shape) == 1 else "Q6_K" if more else most
            yield names[name].replace("{i}", str(i)), shape, kind
        if d.mixture is not None:
            yield from _experts(recipe, i, d.mixture.count, most)


def _more_bits(layer: int, count: int) -> bool:
    """Does llama.cpp's Q4_K_M give this layer's values and down more bits (`use_more_bits`)?"""
    first = count // 8
    return layer < first or layer >= 7 * count // 8 or (layer - first) % 3 == 2


def shapes(d: Description) -> dict[str, tuple[int, ...]]:
    """Our tensor names and their shapes, of one layer; {i} is not filled in."""
    q, kv = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    out: dict[str, tuple[int, ...]] = {
        "attn_norm": (d.width,),
        "q": (q, d.width), "k": (kv, d.width), "v": (kv, d.width), "o": (d.width, q),
        "ffn_norm": (d.width,),
    }  # fmt: skip
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


def _experts(
    recipe: Recipe, layer: int, count: int, kind: str
) -> Iterator[tuple[str, tuple[int, ...], str]]:
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
            yield from ((foreign.replace("{e}", str(e)), shape, kind) for e in range(count))
        else:
            yield foreign, (count, *shape), kind
