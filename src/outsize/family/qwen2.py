"""Qwen2 and Qwen2.5: llama with biases on query, key and value; few have windows, in their upper layers."""

from __future__ import annotations

from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family.common import HEEDED, WINDOWS, describe, names, sliding, window
from outsize.family.config import Config
from outsize.family.recipe import Recipe
from outsize.model_config import Layer

DEFAULTS: dict[str, object] = {
    **HEEDED,
    **WINDOWS,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "max_window_layers": 28,
    "layer_types": None,
}  # fmt: skip


def recipe(config: Config) -> Recipe:
    base = describe(config)
    made = replace(base, qkv_bias=True, layers=layers(config, base.layers))
    return Recipe(made, names(config), interleaved=False)


def layers(config: Config, plain: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """With their windows: of the layers of that type, or of all from `max_window_layers` on. GGUF files
    of Qwen have none: llama.cpp reads no window for them."""
    if config.format == "gguf":
        return plain
    reach, first = window(config), config.get("max_window_layers")
    if config.get("layer_types") is not None:
        has = sliding(config, len(plain), 1)
    elif isinstance(first, int):
        has = [reach is not None and i >= first for i in range(len(plain))]
    else:
        raise UnsupportedError(f"config: max_window_layers is {first!r}, a number is expected")
    if any(has) and reach is None:
        raise UnsupportedError(
            "config: layer_types has sliding_attention, but use_sliding_window is not true or "
            "sliding_window is null"
        )
    return tuple(Layer(p.rope, reach if h else None) for p, h in zip(plain, has, strict=True))
