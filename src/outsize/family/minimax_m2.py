"""MiniMax M2: 256 experts chosen by sigmoids and a bias, half of each head turned, one norm over all query
heads, one over all key heads."""

from __future__ import annotations

from dataclasses import replace

from outsize.family.common import HEEDED, MIXTRAL, describe, mixture, names, sigmoid, with_names
from outsize.family.config import Config
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **HEEDED,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "head_dim": 128,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "max_position_embeddings": 196_608,
    "rope_theta": 5_000_000.0,
    "partial_rotary_factor": None,
    "rotary_dim": None,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
}
# What the published config says beside what transformers' class reads.
FIXED: dict[str, tuple[object, ...]] = {
    "scoring_func": (None, "sigmoid"), "use_routing_bias": (None, True), "use_qk_norm": (None, True),
    "qk_norm_type": (None, "per_layer"), "shared_intermediate_size": (None, 0),
    "attention_bias": (None, False), "norm_topk_prob": (None, True), "sliding_window": (None,),
}  # fmt: skip
GGUF_READ = ("scoring_func", "rotary_dim")
HF_LAYER = with_names({**MIXTRAL, "choice_bias": "block_sparse_moe.e_score_correction_bias"})


def recipe(config: Config) -> Recipe:
    base = describe(config)
    mixed = replace(mixture(config, renorm=True), score=sigmoid(config), choice_bias=True)
    made = replace(base, qk_norm_whole=True, mixture=mixed, ffn_width=mixed.width)
    return Recipe(made, names(config, HF_LAYER), interleaved=False)
