"""Gemma 4 (text): layers with a window and small heads, and every few that see all, with large ones; values
normed; the last layers read the keys and values of earlier ones; each layer reads its tokens themselves. In
the 26B, experts beside a dense feed-forward."""

from __future__ import annotations

from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family import common, gemma4_parts
from outsize.family.common import HEEDED, describe, names
from outsize.family.config import Config
from outsize.family.gemma4_parts import GGUF_LAYER, LAYER, layers, usual
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **{
        k: HEEDED[k]
        for k in ("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size")
    },
    **gemma4_parts.SIZES,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "layer_types": None,
    "final_logit_softcapping": None,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
    "per_layer_config": None,
}
FIXED: dict[str, tuple[object, ...]] = {
    "attention_bias": (None, False),
    "rope_scaling": (None,),
    "use_bidirectional_attention": (None, False, "vision"),  # of images' tokens alone
}
GGUF_READ = (
    "swa_head_dim", "swa_value_length", "swa_rotary_dim", "num_kv_shared_layers",
    "hidden_size_per_layer_input", "final_logit_softcapping",
)  # fmt: skip


def recipe(config: Config) -> Recipe:
    is_gguf, made = config.format == "gguf", usual(config)
    base = describe(made, "sliding_attention")
    its_layers = layers(config, base, made.integer("sliding_window"))
    shared = tuple(i for i, layer in enumerate(its_layers) if layer.shares is not None)
    mixture = gemma4_parts.mixture(made, base.ffn_width)
    token_width = config.count("hidden_size_per_layer_input")
    if mixture is not None and token_width:
        raise UnsupportedError(
            f"config: {config.key('hidden_size_per_layer_input')} is {token_width} beside experts, which no "
            "known Gemma 4 has"
        )
    rows = config.integer("vocab_size_per_layer_input", base.vocab_size)
    if token_width and not is_gguf and rows != base.vocab_size:
        raise UnsupportedError(
            f"config: vocab_size_per_layer_input is {rows:,}; rows for all {base.vocab_size:,} "
            "tokens are known"
        )
    cap = config.get("final_logit_softcapping")
    cap = 30.0 if cap is None and is_gguf else cap  # as llama.cpp has it
    found = replace(
        base,
        layers=its_layers,
        activation="gelu_tanh" if is_gguf else common.activation(config, "hidden_activation"),
        embed_scale=base.width**0.5,
        attn_scale=1.0,
        qk_norm=True,
        value_norm=True,
        post_norm=True,
        logit_cap=config.number("final_logit_softcapping", 30.0) if cap else 0.0,
        mixture=mixture,
        token_width=token_width,
        out_scale=config.has("layer_output_scale.weight" if is_gguf else ".layer_scalar"),
    )
    own = names(made, LAYER, GGUF_LAYER)
    return Recipe(
        found,
        {**own, **gemma4_parts.top(config, own["embed"])},
        interleaved=False,
        spares=gemma4_parts.spares(config, shared),
        instead=gemma4_parts.values(config, base, own),
    )
