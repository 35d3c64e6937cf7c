"""Ministral 3: Mistral with YaRN positions, and queries that grow beyond the original context."""

from __future__ import annotations

from dataclasses import replace

from outsize.family import mistral
from outsize.family.common import describe, names
from outsize.family.config import Config
from outsize.family.recipe import Recipe

YARN: dict[str, object] = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16_384, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 1_000_000.0,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip
DEFAULTS: dict[str, object] = {
    **{k: v for k, v in mistral.DEFAULTS.items() if k != "layer_types"},
    "head_dim": 128,
    "num_hidden_layers": 34,
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "rope_parameters": YARN,
    "llama_4_scaling_beta": None,
    "sliding_window": None,
}
GGUF_READ = ("yarn_log_multiplier", "temperature_scale")
SPARES = (r"(model\.)?(vision_tower|multi_modal_projector)\..*",)


def recipe(config: Config) -> Recipe:
    if config.format != "gguf":
        return replace(mistral.recipe(config), spares=SPARES)
    made = describe(config)
    if config.get("temperature_scale"):
        growth, key = config.number("temperature_scale"), "rope.scaling.original_context_length"
        original = config.integer(key, config.integer("max_position_embeddings"))
        rope = replace(made.layers[0].rope, query_growth=growth, original=original)
        made = replace(made, layers=(replace(made.layers[0], rope=rope),) * made.num_layers)
    return Recipe(made, names(config), interleaved=True)
