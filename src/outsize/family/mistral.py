"""Mistral 7B and its kin: llama, some with a sliding window in every layer."""

from __future__ import annotations

from dataclasses import replace

from outsize.family.common import HEEDED, describe, names, sliding, window
from outsize.family.config import Config
from outsize.family.recipe import Recipe
from outsize.model_config import Layer

DEFAULTS: dict[str, object] = {
    **HEEDED,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "layer_types": None,
}


def recipe(config: Config) -> Recipe:
    base = describe(config)
    # llama.cpp, whose files say "llama", knows no window for them.
    reach = None if config.architecture == "llama" else window(config)
    stated = config.get("layer_types") is not None  # Ministral: of some layers
    has = sliding(config, base.num_layers, 1) if stated else [True] * base.num_layers
    pairs = zip(base.layers, has, strict=True)
    layers = tuple(Layer(layer.rope, reach if h else None) for layer, h in pairs)
    made = replace(base, layers=layers)
    return Recipe(made, names(config), interleaved=config.format == "gguf")
