"""SmolLM3: llama in which every fourth layer has no positions."""

from __future__ import annotations

from dataclasses import replace

from outsize.family.common import HEEDED, WINDOWS, describe, names, positioned, sliding, window
from outsize.family.config import Config
from outsize.family.recipe import Recipe
from outsize.model_config import Layer

DEFAULTS: dict[str, object] = {
    **HEEDED,
    **WINDOWS,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rope_theta": 2_000_000.0,
    "sliding_window": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "layer_types": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}
PERIOD = 4  # of a GGUF, which does not say


def recipe(config: Config) -> Recipe:
    base = describe(config)
    made = replace(base, layers=_layers(config, base.layers))
    return Recipe(made, names(config), interleaved=config.format == "gguf")


def _layers(config: Config, plain: tuple[Layer, ...]) -> tuple[Layer, ...]:
    count, is_gguf = len(plain), config.format == "gguf"
    period = PERIOD if is_gguf else config.integer("no_rope_layer_interval")
    turns = positioned(config, count, period)
    reach, has = (None, [False] * count) if is_gguf else (window(config), [not t for t in turns])
    if not is_gguf and config.get("layer_types") is not None:
        has = sliding(config, count, 1)
    return tuple(
        Layer(p.rope if t else replace(p.rope, rotated=0, divisors=()), reach if h else None)
        for p, t, h in zip(plain, turns, has, strict=True)
    )
