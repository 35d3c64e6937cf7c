"""GLM 4.5 to 4.7 (Air and full): experts chosen by sigmoids and a bias, one expert for all tokens beside,
first layers without experts, half of each head turned; the full ones norm each query and key head."""

from __future__ import annotations

from dataclasses import replace

from outsize.family.common import (
    HEEDED,
    SHARED,
    describe,
    first_dense,
    names,
    sigmoid_mixture,
    with_names,
    without_next,
)
from outsize.family.config import Config
from outsize.family.further import behind
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **HEEDED,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "use_qk_norm": False,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 1,
}
GGUF_READ = (
    "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "norm_topk_prob",
    "routed_scaling_factor", "num_nextn_predict_layers", "scoring_func", "rotary_dim",
)  # fmt: skip


def recipe(config: Config) -> Recipe:
    config, spares = without_next(config)
    base, is_gguf = describe(config), config.format == "gguf"
    made = replace(
        base,
        o_bias=is_gguf and base.o_bias,  # Hugging Face's bias is of query, key and value only
        qk_norm=config.has(".attn_q_norm.weight") if is_gguf else config.flag("use_qk_norm"),
        layers=first_dense(config, base.layers),
        mixture=sigmoid_mixture(config),
    )
    own = {"ffn_norm": "blk.{i}.post_attention_norm.weight"}
    named = names(config, with_names(SHARED), own)
    return Recipe(made, named, interleaved=False, spares=spares)


def further(made: Recipe, is_gguf: bool) -> Recipe:
    """Of the layer that predicts the token after next."""
    return behind(made, is_gguf)
