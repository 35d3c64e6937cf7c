"""OLMoE: 64 small experts, 8 used, whose weights are not made to sum to 1; one norm over all query heads,
one over all key heads."""

from __future__ import annotations

from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family.common import EXPERTS, HEEDED, describe, mixture, names, with_names
from outsize.family.config import Config
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **HEEDED,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": None,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}
FIXED: dict[str, tuple[object, ...]] = {"clip_qkv": (None,), "attention_bias": (False,)}


def recipe(config: Config) -> Recipe:
    base = replace(describe(config), qk_norm_whole=True)
    if base.qkv_bias:
        raise UnsupportedError("biases of query, key and value are not known for olmoe")
    mixed = mixture(config, renorm=config.flag("norm_topk_prob"))
    made = replace(base, mixture=mixed, ffn_width=mixed.width)
    return Recipe(made, names(config, with_names(EXPERTS)), interleaved=False)
