"""Phi-3, Phi-3.5-mini and Phi-4: llama with query, key and value in one tensor, gate and up in another, and a
rope of two sets of divisors where the context is long. Phi-4-mini turns three quarters of each head."""

from __future__ import annotations

from dataclasses import replace

from outsize.family.common import HEEDED, describe, names, window, with_names
from outsize.family.config import Config
from outsize.family.recipe import Recipe
from outsize.model_config import Layer

DEFAULTS: dict[str, object] = {
    **HEEDED,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": None,
    "sliding_window": None,
}
FIXED: dict[str, tuple[object, ...]] = {"attention_bias": (None, False), "mlp_bias": (None, False)}
GGUF_READ = ("rotary_dim",)
HF_LAYER = with_names({"qkv": "self_attn.qkv_proj.weight", "gate_up": "mlp.gate_up_proj.weight"})
GGUF = {"qkv": "blk.{i}.attn_qkv.weight", "gate_up": "blk.{i}.ffn_up.weight"}
SPARES = (r"rope_factors_(long|short)\.weight",)  # read with the config


def recipe(config: Config) -> Recipe:
    base, reach = describe(config), config.count("sliding_window") or None
    reach = reach if config.format == "gguf" else window(config)
    layers = tuple(Layer(layer.rope, reach) for layer in base.layers)
    made = replace(base, layers=layers)
    return Recipe(made, names(config, HF_LAYER, GGUF), interleaved=False, spares=SPARES)
