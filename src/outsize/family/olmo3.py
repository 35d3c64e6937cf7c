"""OLMo 3: OLMo 2 with a sliding window in three of four layers, and YaRN positions in the others."""

from __future__ import annotations

from dataclasses import replace

from outsize.family.common import HEEDED, POST_NORMED, describe, names, sliding, window
from outsize.family.config import Config
from outsize.family.recipe import Recipe
from outsize.family.rope import rope
from outsize.model_config import Description, Layer, Rope

DEFAULTS: dict[str, object] = {
    **HEEDED,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "attention_bias": False,
    "sliding_window": 4096,
    "layer_types": None,
}
FIXED: dict[str, tuple[object, ...]] = {"clip_qkv": (None,)}
PERIOD = 4


def normed(d: Description) -> Description:
    """With norms after each half, and of all query heads, and of all key heads."""
    return replace(d, pre_norm=False, post_norm=True, qk_norm_whole=True)


def recipe(config: Config) -> Recipe:
    base = describe(config, "" if config.format == "gguf" else "full_attention")
    made = replace(normed(base), layers=_layers(config, base.layers))
    return Recipe(made, names(config, POST_NORMED), interleaved=False)


def _layers(config: Config, full: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Those with windows have a rope of the same base that is not scaled."""
    reach = window(config) if config.get("sliding_window") else None
    if reach is None:
        return full
    local = Rope(full[0].rope.base)
    if config.format != "gguf":
        local = rope(_local(config), "sliding_attention")
    has = sliding(config, len(full), PERIOD)
    return tuple(Layer(local, reach) if h else p for p, h in zip(full, has, strict=True))


def _local(config: Config) -> Config:
    """The config as the layers with windows read it: scaling that is stated for all is not theirs."""
    inner = config.table("rope_parameters").get("sliding_attention")
    values = {"rope_parameters": {"sliding_attention": inner}, "rope_scaling": None}
    return replace(config, values={**config.values, **values})
