"""Qwen3 with experts (30B-A3B, 235B-A22B): 128 small ones, 8 used."""

from __future__ import annotations

from dataclasses import replace

from outsize.family import common
from outsize.family.common import EXPERTS, HEEDED, WINDOWS, describe, mixture, names
from outsize.family.config import Config
from outsize.family.recipe import Recipe
from outsize.model_config import Layer

DEFAULTS: dict[str, object] = {
    **HEEDED,
    **WINDOWS,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "attention_bias": False,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
}  # fmt: skip
# Layers without experts are not known.
FIXED: dict[str, tuple[object, ...]] = {
    "decoder_sparse_step": (1,), "mlp_only_layers": (None, []),
}  # fmt: skip


def recipe(config: Config) -> Recipe:
    base, is_gguf = describe(config), config.format == "gguf"
    renorm = is_gguf or config.flag("norm_topk_prob")
    mixed = mixture(config, renorm, "intermediate_size" if is_gguf else "moe_intermediate_size")
    reach = None if is_gguf else common.window(config)
    layers = tuple(Layer(layer.rope, reach) for layer in base.layers)
    made = replace(base, qk_norm=True, mixture=mixed, ffn_width=mixed.width, layers=layers)
    return Recipe(made, names(config, common.with_names(EXPERTS)), interleaved=False)
