"""Qwen3.5 with experts (35B-A3B, 122B-A10B, 397B-A17B), its text part: Qwen3-Next with the inputs of the
delta rule apart."""

from __future__ import annotations

from dataclasses import replace

from outsize.family import delta, qwen3_5
from outsize.family.config import Config
from outsize.family.further import apart
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **delta.DEFAULTS,
    **delta.MIXED,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
}
FIXED = qwen3_5.FIXED
GGUF_READ = (*qwen3_5.GGUF_READ, "shared_expert_intermediate_size")


def recipe(config: Config) -> Recipe:
    made = qwen3_5.recipe(config)
    mixed = delta.mixture(config, True)
    return replace(
        made, description=replace(made.description, mixture=mixed, ffn_width=mixed.width)
    )


def further(made: Recipe, is_gguf: bool) -> Recipe | None:
    """Of the layer that predicts the token after next, which GGUF files leave out."""
    return None if is_gguf else apart(made)
