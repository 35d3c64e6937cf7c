"""Granite 3 and 4 (dense): llama with multipliers of embeddings, attention's scores, what is added to the
residual stream, and logits."""

from __future__ import annotations

from dataclasses import replace

from outsize.family import llama
from outsize.family.common import describe, names
from outsize.family.config import Config
from outsize.family.recipe import Recipe
from outsize.model_config import Description

MULTIPLIERS: dict[str, object] = {
    "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}  # fmt: skip
DEFAULTS: dict[str, object] = {
    **llama.DEFAULTS,
    **MULTIPLIERS,
}
GGUF_READ = tuple(MULTIPLIERS)


def multiplied(config: Config) -> Description:
    """A llama with its multipliers. llama.cpp takes 0, and a key that is not there, for none."""
    base = describe(config)
    is_gguf = config.format == "gguf"

    def number(key: str, none: float) -> float:
        return none if is_gguf and not config.get(key) else config.number(key)

    return replace(
        base,
        embed_scale=number("embedding_multiplier", 1.0),
        attn_scale=number("attention_multiplier", base.attn_scale),
        residual_scale=number("residual_multiplier", 1.0),
        logit_scale=1 / number("logits_scaling", 1.0),
    )


def recipe(config: Config) -> Recipe:
    return Recipe(multiplied(config), names(config), interleaved=config.format == "gguf")
