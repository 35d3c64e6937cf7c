"""Gemma 2: scores and logits with a soft cap, every other layer in a sliding window, norms before and after
each half, a scaled embedding."""

from __future__ import annotations

import math
from dataclasses import replace

from outsize.family import common
from outsize.family.common import HEEDED, describe, names, sliding, window
from outsize.family.config import Config
from outsize.family.gemma3 import HF_LAYER
from outsize.family.recipe import Recipe
from outsize.model_config import Layer

DEFAULTS: dict[str, object] = {
    **HEEDED,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "gelu_pytorch_tanh"),  # not read
}
GGUF_READ = ("attn_logit_softcapping", "final_logit_softcapping")
PERIOD, LARGEST = 2, 46  # layers of the 27B, whose scale is of another size


def recipe(config: Config) -> Recipe:
    base, is_gguf, reach = describe(config), config.format == "gguf", window(config)
    has = sliding(config, base.num_layers, PERIOD)
    layers = (Layer(p.rope, reach if h else None) for p, h in zip(base.layers, has, strict=True))
    is_27b = is_gguf and base.num_layers == LARGEST
    usual = base.width / base.num_heads if is_27b else float(base.head_dim)
    made = replace(
        base,
        layers=tuple(layers),
        activation="gelu_tanh" if is_gguf else common.activation(config, "hidden_activation"),
        embed_scale=base.width**0.5,
        attn_scale=1 / math.sqrt(config.number("query_pre_attn_scalar", usual)),
        post_norm=True,
        attn_cap=_cap(config, "attn_logit_softcapping", 50.0),
        logit_cap=_cap(config, "final_logit_softcapping", 30.0),
    )
    return Recipe(made, names(config, HF_LAYER), False, norm_shift=0.0 if is_gguf else 1.0)


def _cap(config: Config, key: str, usual: float) -> float:
    """A GGUF that does not say has the usual one; a config that says null has none."""
    if config.format == "gguf":
        return config.number(key, usual)
    return 0.0 if config.get(key) is None else config.number(key)
