"""Gemma 3 (text): most layers see a sliding window with their own rope base, every sixth sees all;
norms before and after each half, a norm on each query and key head, a scaled embedding."""

from __future__ import annotations

import math
from dataclasses import replace

from outsize.errors import CheckpointError
from outsize.family.common import describe, names, window, with_names
from outsize.family.description import Config, Layer, Recipe, Rope

PATTERN = 6
HF_LAYER = with_names(
    {
        "attn_post_norm": "post_attention_layernorm.weight",
        "ffn_norm": "pre_feedforward_layernorm.weight",
        "ffn_post_norm": "post_feedforward_layernorm.weight",
    }
)


def recipe(config: Config) -> Recipe:
    base = describe(config, context=131_072)
    made = replace(
        base,
        layers=_layers(config, base.num_layers),
        activation="gelu_tanh",
        embed_scale=base.width**0.5,
        attn_scale=_attn_scale(config, base.width, base.num_heads, base.head_dim),
        qk_norm=True,
        post_norm=True,
    )
    shift = 0.0 if config.format == "gguf" else 1.0
    return Recipe(made, names(config, HF_LAYER), interleaved=False, norm_shift=shift)


def _layers(config: Config, count: int) -> tuple[Layer, ...]:
    local = Layer(_local_rope(config), window(config) or 4096)
    full = Layer(config.rope("full_attention"))
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(full if (i + 1) % PATTERN == 0 else local for i in range(count))
    if not isinstance(kinds, list) or len(kinds) != count:
        raise CheckpointError(f"config: layer_types does not list {count} layers")
    return tuple(full if kind == "full_attention" else local for kind in kinds)


def _local_rope(config: Config) -> Rope:
    table = config.get("rope_parameters")
    inner = table.get("sliding_attention") if isinstance(table, dict) else None
    if isinstance(inner, dict) and isinstance(inner.get("rope_theta"), int | float):
        return Rope(float(inner["rope_theta"]))
    return Rope(config.number("rope_local_base_freq", 10_000.0))


def _attn_scale(config: Config, width: int, num_heads: int, head_dim: int) -> float:
    """1 / sqrt of the stated scalar; GGUF leaves it out, and only the 27B differs from head_dim."""
    is_27b = config.format == "gguf" and config.integer("num_hidden_layers") == 62
    usual = width / num_heads if is_27b else float(head_dim)
    return 1 / math.sqrt(config.number("query_pre_attn_scalar", usual))
