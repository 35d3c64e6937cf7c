"""DeepSeek V3 and R1 (and Kimi K2, which has their shape): latent attention, experts chosen by sigmoids and a
bias from the best groups, one expert for all tokens beside, first layers without experts."""

from __future__ import annotations

from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family import common, latent
from outsize.family.common import HEEDED, SHARED, first_dense, sigmoid_mixture
from outsize.family.config import Config
from outsize.family.further import behind
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **{key: value for key, value in HEEDED.items() if key != "head_dim"},
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "max_position_embeddings": 4096,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}
GGUF_READ = latent.GGUF_READ
# What published configs say beside what transformers' class reads.
FIXED: dict[str, tuple[object, ...]] = {
    "scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc"), "moe_layer_freq": (None, 1),
    "rope_interleave": (None, True), "attention_bias": (None, False),
}  # fmt: skip


def recipe(config: Config) -> Recipe:
    config, spares = common.without_next(config)
    # Files of GLM 4.7 Flash from before 2026-01-21 do not say, but experts have the bias that V2's have not.
    is_silent = config.format == "gguf" and config.get("scoring_func") is None
    if is_silent and not config.has(".exp_probs_b.bias"):
        raise UnsupportedError(
            f"config: {config.key('scoring_func')} is missing: a DeepSeek V2, whose experts are weighed by "
            "a softmax; V3 and GLM 4.7 Flash are known"
        )
    base = latent.described(config)
    layers = first_dense(config, base.layers)
    made = replace(base, layers=layers, mixture=sigmoid_mixture(config))
    assert base.latent is not None
    hf, gguf = latent.query_names(config, base.latent)
    named = common.names(config, common.with_names({**SHARED, **hf}), gguf)
    return Recipe(made, named, interleaved=True, spares=spares)


def further(made: Recipe, is_gguf: bool) -> Recipe:
    """Of the layer that predicts the token after next."""
    return behind(made, is_gguf)
