"""OLMo 2: norms after each half and none before; one norm over all query heads, one over all key heads."""

from __future__ import annotations

from outsize.family import olmo3
from outsize.family.common import HEEDED, POST_NORMED, describe, names
from outsize.family.config import Config
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **HEEDED,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}
FIXED: dict[str, tuple[object, ...]] = {"clip_qkv": (None,)}


def recipe(config: Config) -> Recipe:
    if config.format == "gguf":  # which calls both olmo2
        return olmo3.recipe(config)
    return Recipe(olmo3.normed(describe(config)), names(config, POST_NORMED), interleaved=False)
