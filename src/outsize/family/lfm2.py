"""LFM2 (Liquid AI): gated short convolutions in most layers, attention with head norms in the others."""

from __future__ import annotations

from dataclasses import replace

from outsize.family.common import HEEDED, describe, names, with_names
from outsize.family.config import Config
from outsize.family.convolutions import usual
from outsize.family.recipe import Recipe

UNREAD = ("rms_norm_eps", "hidden_act", "original_max_position_embeddings")
DEFAULTS: dict[str, object] = {
    **{key: value for key, value in HEEDED.items() if key not in UNREAD},
    "hidden_size": 2560,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "rope_theta": 1_000_000.0,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "tie_embedding": None,
    "block_ff_dim": None,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "conv_L_cache": 3,
    "full_attn_idxs": None,
    "layer_types": None,
}
FIXED: dict[str, tuple[object, ...]] = {"conv_bias": (False,)}
GGUF_READ = ("conv_L_cache",)
HF_LAYER = with_names(
    {
        "attn_norm": "operator_norm.weight",
        "o": "self_attn.out_proj.weight",
        "q_norm": "self_attn.q_layernorm.weight",
        "k_norm": "self_attn.k_layernorm.weight",
        "ffn_norm": "ffn_norm.weight",
        "gate": "feed_forward.w1.weight",
        "up": "feed_forward.w3.weight",
        "down": "feed_forward.w2.weight",
        "conv_in": "conv.in_proj.weight",
        "conv_taps": "conv.conv.weight",
        "conv_o": "conv.out_proj.weight",
    }
)
GGUF = {
    "final_norm": "token_embd_norm.weight",
    "conv_in": "blk.{i}.shortconv.in_proj.weight",
    "conv_taps": "blk.{i}.shortconv.conv.weight",
    "conv_o": "blk.{i}.shortconv.out_proj.weight",
}


def recipe(config: Config) -> Recipe:
    plain, kinds = usual(config)
    base = describe(plain)
    layers = tuple(replace(x, mixer=k) for x, k in zip(base.layers, kinds, strict=True))
    kernel = config.integer("conv_L_cache") if "conv" in kinds else 0
    made = replace(base, qk_norm=True, kernel=kernel, layers=layers)
    named = dict(names(plain, HF_LAYER, GGUF))
    if config.format != "gguf":
        named["final_norm"] = "model.embedding_norm.weight"
    return Recipe(made, named, interleaved=False)
