"""Llama 2 and 3, SmolLM2 and the many that share their shape."""

from __future__ import annotations

from outsize.family import mixtral
from outsize.family.common import HEEDED, describe, names
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
    "attention_bias": False,
    "mlp_bias": False,
}


def recipe(config: Config) -> Recipe:
    if config.format == "gguf" and config.get("num_local_experts"):
        return mixtral.recipe(config)
    # GGUF keeps llama's query/key rows in adjacent pairs; Hugging Face splits heads in halves.
    return Recipe(describe(config), names(config), interleaved=config.format == "gguf")
