"""Sizes of synthetic models, and the tensors that a model of a family and size has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import outsize.family as family_folder
from outsize import registry
from outsize.errors import OptionError
from outsize.family import common
from outsize.family.config import FEW_KEYS, GGUF_KEYS, Config
from outsize.family.find import ALIASES, families
from outsize.family.recipe import Recipe
from outsize.model_config import Mixture
from outsize.model_parts import Delta, Latent
from outsize.pack.kinds.kind import groups
from outsize.pack.kinds.layers import DENSE, FINAL, MIXERS, layers_of
from outsize.pack.records import FIXED, HALVES, POSITIONS, TensorSpec

SMALL, SMALL_DELTA = Latent(64, 32, 32, 32, 64), Delta(2, 4, 32, 32, 4)


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
    dense: int = 0  # width of the layers without experts; 0: as an expert's
    latent: Latent = SMALL  # of families that have it
    delta: Delta = SMALL_DELTA

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
    "30b-a3b-flash": Size(  # GLM 4.7 Flash
        47, 2048, 1536, 20, 20, 154_880, experts=64, used=4, dense=10_240,
        latent=Latent(512, 64, 192, 256, 768),
    ),
    "35b-a3b": Size(  # Qwen3.5
        40, 2048, 512, 16, 2, 248_320, head_dim=256, experts=256, used=8, delta=Delta(16, 32, 128, 128, 4)
    ),
    "70b": Size(80, 8192, 28_672, 64, 8, 128_256),
}  # fmt: skip
# Types of layers' matrices, the embedding and the head.
MIXES = {
    "q4_0": ("Q4_0", "Q8_0", "Q8_0"),
    "q4_k_m": ("Q4_K", "Q4_K", "Q6_K"),
    "q3_k": ("Q3_K", "Q8_0", "Q8_0"),
}
# In a GGUF.
ARCHITECTURES = {
    "qwen3_moe": "qwen3moe", "mixtral": "llama", "gpt_oss": "gpt-oss", "qwen2_moe": "qwen2moe",
    "minimax_m2": "minimax-m2", "glm4_moe": "glm4moe", "deepseek_v3": "deepseek2",
    "glm4_moe_lite": "deepseek2", "ministral3": "mistral3", "olmo3": "olmo2", "qwen3_next": "qwen3next",
    "qwen3_5": "qwen35", "qwen3_5_moe": "qwen35moe",
}  # fmt: skip
SIGMOID: dict[str, object] = {
    "n_shared_experts": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
}  # fmt: skip


def values(size: Size, family: str = "") -> dict[str, object]:
    """The config, under Hugging Face's names."""
    if family == "opt":
        return {
            "num_hidden_layers": size.layers, "hidden_size": size.width, "ffn_dim": size.ffn,
            "num_attention_heads": size.heads, "max_position_embeddings": size.context,
        }  # fmt: skip
    mixed = {
        "num_local_experts": size.experts, "num_experts_per_tok": size.used,
        "moe_intermediate_size": size.ffn,
    }  # fmt: skip
    return (mixed if size.experts else {}) | {
        "num_hidden_layers": size.layers, "hidden_size": size.width,
        "intermediate_size": size.dense or size.ffn,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "head_dim": size.head,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "max_position_embeddings": size.context,
    } | _own(family, size)  # fmt: skip


def _own(family: str, size: Size) -> dict[str, object]:
    """What few families' configs say beside."""
    if family == "qwen2_moe":
        return {"shared_expert_intermediate_size": 4 * size.ffn}
    if family in ("deepseek_v3", "glm4_moe_lite"):
        x = size.latent
        return SIGMOID | {
            "kv_lora_rank": x.rank, "q_lora_rank": x.query_rank, "qk_rope_head_dim": x.rope,
            "qk_nope_head_dim": x.key, "v_head_dim": x.value, "num_key_value_heads": size.heads,
            "n_group": 1, "topk_group": 1,
        }  # fmt: skip
    if family == "falcon":
        return {"num_key_value_heads": 1, "layer_norm_epsilon": 1e-5}
    if family in ("qwen3_next", "qwen3_5", "qwen3_5_moe"):
        y = size.delta
        mixed: dict[str, object] = (
            {"shared_expert_intermediate_size": size.ffn} if size.experts else {}
        )
        return mixed | {
            "linear_num_key_heads": y.key_heads, "linear_num_value_heads": y.value_heads,
            "linear_key_head_dim": y.key, "linear_value_head_dim": y.value,
            "linear_conv_kernel_dim": y.kernel, "full_attention_interval": 2 if size.layers % 4 else 4,
        }  # fmt: skip
    if family == "lfm2":
        return {
            "conv_L_cache": 3, "full_attn_idxs": _attending(size), "block_auto_adjust_ff_dim": False,
        }  # fmt: skip
    if family == "llama4":
        return {"interleave_moe_layer_step": 1}
    return SIGMOID if family == "glm4_moe" else {}


def _attending(size: Size) -> list[int]:
    """Layers of attention where most are of short convolutions."""
    return [i for i in range(size.layers) if i % 3 == 1]


def gguf_values(family: str, size: Size) -> dict[str, object]:
    """The same, under a GGUF's names."""
    found, x = values(size, family), size.latent
    if "kv_lora_rank" in found:
        for key in ("qk_rope_head_dim", "qk_nope_head_dim"):
            del found[key]
        found |= {"rotary_dim": x.rope, "qk_head_dim": x.key + x.rope, "num_key_value_heads": 1}
        found |= {"head_dim": x.rank + x.rope, "value_length": x.rank}
    if "full_attn_idxs" in found:
        del found["block_auto_adjust_ff_dim"], found["full_attn_idxs"]
        heads = [size.kv_heads * (i in _attending(size)) for i in range(size.layers)]
        found["num_key_value_heads"] = heads
    if "linear_value_head_dim" in found:
        del found["linear_value_head_dim"]
        found |= {"linear_values": size.delta.values, "rotary_dim": size.head // 4}
    if family in ("deepseek_v3", "glm4_moe_lite", "glm4_moe", "minimax_m2"):
        found["scoring_func"] = common.SIGMOID
    architecture = ARCHITECTURES.get(family, family)
    return {f"{architecture}.{GGUF_KEYS.get(k) or FEW_KEYS[k]}": v for k, v in found.items()}


def recipe(family: str, size: Size, format: str = "gguf") -> Recipe:
    """As the family describes a checkpoint of these numbers. Raises UnsupportedError."""
    made = registry.module(family_folder, family, "architecture", families())
    keys = {**made.DEFAULTS, **values(size, family), "vocab_size": size.vocab}
    if format == "gguf":
        keys, architecture = gguf_values(family, size), ARCHITECTURES.get(family, family)
        reader = ALIASES.get(architecture, architecture)
        made = registry.module(family_folder, reader, "architecture", families())
    else:
        architecture = family
    names = frozenset({"output.weight", "lm_head.weight", "model.embed_tokens.weight"})
    found: Recipe = made.recipe(Config(format, architecture, keys, names, size.vocab))
    if (found.description.mixture is None) != (size.experts == 0):
        raise OptionError(f"{family} and this size disagree about experts; name another of either")
    return found


Listed = Iterator[tuple[str, tuple[int, ...], str]]


def tensors(recipe: Recipe, types: str = "q4_0") -> Listed:
    """(foreign name, shape, GGUF type) of every tensor, with the types of a mix: one of MIXES (q4_k_m with
    Q4_K for experts' down, too)."""
    d, names = recipe.description, recipe.names
    most, embed, head = MIXES[types]
    yield names["embed"], (d.vocab_size, d.width), embed
    yield names["head"], (d.vocab_size, d.width), head
    final = next(group for _, group in groups(d) if group.name == FINAL)
    for name, spec in final.specs.items():
        yield from _of(recipe, name, spec, most, most)
    parts = [group for _, group in groups(d) if group.name in ("ffn", DENSE, *MIXERS)]
    for i in range(d.num_layers):
        large = "Q6_K" if types == "q4_k_m" and _more_bits(i, d.num_layers) else most
        for group in parts:
            for name, spec in group.specs.items() if i in layers_of(d, group.name) else ():
                for foreign, shape, kind in _of(recipe, name, spec, most, large):
                    yield foreign.replace("{i}", str(i)), shape, kind
        if d.mixture is not None and i in d.routed:
            yield from _experts(recipe, i, d.mixture, most)


def _more_bits(layer: int, count: int) -> bool:
    """Does llama.cpp's Q4_K_M give this layer's values and down more bits (`use_more_bits`)?"""
    first = count // 8
    return layer < first or layer >= 7 * count // 8 or (layer - first) % 3 == 2


def _of(recipe: Recipe, name: str, spec: TensorSpec, most: str, large: str) -> Listed:
    """The tensors that a record's tensor is made of; {i} is not filled in. `large`: the type of values and
    down."""
    d, names = recipe.description, recipe.names
    if name in HALVES and d.latent is not None:
        if name in names:
            yield names[name], (d.num_heads, spec.rows // d.num_heads, spec.width), "Q8_0"
        elif name == "k_b":
            yield (
                names["kv_b"],
                (d.num_heads * (d.latent.key + d.latent.value), d.latent.rank),
                most,
            )
        return
    fused = len(spec.parts) > 1 and name in names
    for part, rows in [(name, spec.rows)] if fused else spec.parts:
        strip = recipe.strips.get(part)
        if strip is not None and strip.first:
            continue  # its tensor is another part's, too
        if strip is not None:
            part, rows = strip.whole, rows // strip.size * strip.every
        kind = large if part in ("v", "down") else most
        kind = "F32" if name in FIXED or not spec.width else kind
        rows += recipe.unused_positions if part == POSITIONS else 0
        yield names[part], (rows, spec.width) if spec.width else (rows,), kind


def _experts(recipe: Recipe, layer: int, m: Mixture, kind: str) -> Listed:
    """Experts: stacked in a GGUF, each by itself elsewhere."""
    d, names, count = recipe.description, recipe.names, m.count
    up, down = (m.width, d.width), (d.width, m.width)
    for name, width in (("gate", m.width), ("up", m.width), ("down", d.width)) if m.bias else ():
        foreign = names[f"expert_{name}_bias"].replace("{i}", str(layer))
        yield foreign, (count, width), "F32"
    for name, shape in (("expert_gate", up), ("expert_up", up), ("expert_down", down)):
        foreign = names[name].replace("{i}", str(layer))
        if "{e}" in foreign:
            yield from ((foreign.replace("{e}", str(e)), shape, kind) for e in range(count))
        else:
            yield foreign, (count, *shape), kind
