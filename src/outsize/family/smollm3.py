"""SmolLM3: llama in which every fourth layer has no positions."""

from __future__ import annotations

from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family.common import HEEDED, WINDOWS, describe, names, sliding, window
from outsize.family.config import Config
from outsize.model_config import Layer, Recipe

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
    turns = _turns(config, count)
    reach, has = (None, [False] * count) if is_gguf else (window(config), [not t for t in turns])
    if not is_gguf and config.get("layer_types") is not None:
        has = sliding(config, count, 1)
    return tuple(
        Layer(p.rope if t else replace(p.rope, rotated=0, divisors=()), reach if h else None)
        for p, t, h in zip(plain, turns, has, strict=True)
    )


def _turns(config: Config, count: int) -> list[bool]:
    """Which layers have positions."""
    said = None if config.format == "gguf" else config.get("no_rope_layers")
    if said is None:
        period = PERIOD if config.format == "gguf" else config.integer("no_rope_layer_interval")
        return [(i + 1) % period != 0 for i in range(count)]
    if not isinstance(said, list) or len(said) != count or any(v not in (0, 1) for v in said):
        raise UnsupportedError(
            f"config: no_rope_layers must list 0 or 1 for each of {count} layers"
        )
    return [v == 1 for v in said]
