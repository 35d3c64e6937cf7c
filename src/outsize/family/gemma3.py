"""Gemma 3 (text): most layers see a sliding window with their own rope base, every sixth sees all;
norms before and after each half, a norm on each query and key head, a scaled embedding."""

from __future__ import annotations

import math
from dataclasses import replace

from outsize.family import common
from outsize.family.common import HEEDED, describe, names, window, with_names
from outsize.family.config import Config
from outsize.family.recipe import Recipe
from outsize.family.rope import rope
from outsize.model_config import Layer, Rope

DEFAULTS: dict[str, object] = {
    **HEEDED,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "layer_types": None,
}
FIXED: dict[str, tuple[object, ...]] = {"hidden_act": ("silu", "gelu_pytorch_tanh")}  # not read
PATTERN = 6
HF_LAYER = with_names(
    {
        "attn_post_norm": "post_attention_layernorm.weight",
        "ffn_norm": "pre_feedforward_layernorm.weight",
        "ffn_post_norm": "post_feedforward_layernorm.weight",
    }
)
# Of the images' half, in one file with the text's.
SPARES = (r"(model\.)?(vision_tower|multi_modal_projector)\..*", r"(v|mm)\..*")


def recipe(config: Config) -> Recipe:
    base, is_gguf = describe(config, "full_attention"), config.format == "gguf"
    made = replace(
        base,
        layers=_layers(config, base.layers),
        activation="gelu_tanh" if is_gguf else common.activation(config, "hidden_activation"),
        embed_scale=base.width**0.5,
        attn_scale=_attn_scale(config, base.width, base.num_heads, base.head_dim),
        qk_norm=True,
        post_norm=True,
    )
    shift = 0.0 if is_gguf else 1.0
    return Recipe(made, names(config, HF_LAYER), False, norm_shift=shift, spares=SPARES)


def _layers(config: Config, full: tuple[Layer, ...]) -> tuple[Layer, ...]:
    if config.format == "gguf":
        if window(config) is None:  # as llama.cpp does
            return full
        local = Layer(Rope(config.number("rope_local_base_freq", 10_000.0)), window(config))
    else:
        local = Layer(_local_rope(config), config.integer("sliding_window"))
    has = common.sliding(config, len(full), PATTERN)
    return tuple(local if h else layer for h, layer in zip(has, full, strict=True))


def _local_rope(config: Config) -> Rope:
    inner = config.table("rope_parameters").get("sliding_attention")
    base = config.number("rope_local_base_freq")
    given = {"rope_theta": base} | (inner if isinstance(inner, dict) else {})
    values = dict(config.values) | {"rope_parameters": {"sliding_attention": given}}
    return rope(replace(config, values=values), "sliding_attention")


def _attn_scale(config: Config, width: int, num_heads: int, head_dim: int) -> float:
    """1 / sqrt of the stated scalar; GGUF leaves it out, and only the 27B differs from head_dim."""
    is_27b = config.format == "gguf" and config.integer("num_hidden_layers") == 62
    usual = width / num_heads if is_27b else float(head_dim)
    return 1 / math.sqrt(config.number("query_pre_attn_scalar", usual))
