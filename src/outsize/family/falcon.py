"""Falcon 7B (arXiv 2311.16867): attention and feed-forward read the same LayerNorm and are added together;
one key head for all; feed-forwards of two matrices. Not those with ALiBi (Falcon-RW), nor the later layout of
40B and 11B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family.common import GGUF_NAMES, HEEDED, describe
from outsize.family.config import Config
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **{k: v for k, v in HEEDED.items() if k not in ("head_dim", "hidden_act", "rms_norm_eps")},
    "hidden_size": 4544,
    "ffn_hidden_size": None,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "activation": "gelu",
    "tie_word_embeddings": True,
}
FIXED: dict[str, tuple[object, ...]] = {
    "alibi": (None, False),
    "new_decoder_architecture": (None, False),
    "num_ln_in_parallel_attn": (None, 1),
    "multi_query": (True,),
    "parallel_attn": (True,),
    "bias": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
}
GGUF_READ = ("layer_norm_epsilon",)
NORM = {"attn_norm": "input_layernorm.weight", "attn_norm_bias": "input_layernorm.bias"}
LAYER = {
    **NORM,
    "qkv": "self_attention.query_key_value.weight",
    "o": "self_attention.dense.weight",
    "up": "mlp.dense_h_to_4h.weight",
    "down": "mlp.dense_4h_to_h.weight",
}
BIASES = {
    "attn_norm_bias": "blk.{i}.attn_norm.bias",
    "final_norm_bias": "output_norm.bias",
    "qkv": "blk.{i}.attn_qkv.weight",
}


def recipe(config: Config) -> Recipe:
    base = describe(_usual(config))
    if config.format == "gguf" and base.num_kv_heads > 1:
        raise UnsupportedError(
            f"config: {config.key('num_key_value_heads')} is {base.num_kv_heads}; of falcon, the layout with "
            "one key head (7B) is known"
        )
    activation = "gelu" if config.format == "gguf" else base.activation
    made = replace(base, two_matrix=True, layer_norm=True, parallel=True, activation=activation)
    return Recipe(made, _names(config), interleaved=False)


def _usual(config: Config) -> Config:
    """Under the usual keys. A GGUF says neither the activation nor the rope's base."""
    eps = {config.key("rms_norm_eps"): config.get("layer_norm_epsilon")}
    if config.format == "gguf":
        return replace(config, values={**config.values, **eps})
    said = {
        "intermediate_size": config.get("ffn_hidden_size") or 4 * config.integer("hidden_size"),
        "hidden_act": config.get("activation"), "num_key_value_heads": 1,
    }  # fmt: skip
    return replace(config, values={**config.values, **said, **eps})


def _names(config: Config) -> Mapping[str, str]:
    if config.format == "gguf":
        return {**GGUF_NAMES, **BIASES}
    top = {
        "embed": "word_embeddings.weight",
        "final_norm": "ln_f.weight",
        "final_norm_bias": "ln_f.bias",
    }
    named = {n: f"transformer.{theirs}" for n, theirs in top.items()}
    named |= {n: f"transformer.h.{{i}}.{theirs}" for n, theirs in LAYER.items()}
    return named | {"head": "lm_head.weight"}
