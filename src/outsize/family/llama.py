"""Llama 2 and 3, SmolLM2 and the many that share their shape."""

from __future__ import annotations

from outsize.family import mixtral
from outsize.family.common import describe, names
from outsize.family.description import Config, Recipe


def recipe(config: Config) -> Recipe:
    if config.format == "gguf" and config.get("num_experts"):
        return mixtral.recipe(config)
    # GGUF keeps llama's query/key rows in adjacent pairs; Hugging Face splits heads in halves.
    return Recipe(describe(config), names(config), interleaved=config.format == "gguf")
