"""Mistral 7B and its kin: llama, some with a sliding window in every layer."""

from __future__ import annotations

from dataclasses import replace

from outsize.family.common import describe, names, window
from outsize.family.description import Config, Layer, Recipe


def recipe(config: Config) -> Recipe:
    base = describe(config)
    layers = tuple(Layer(layer.rope, window(config)) for layer in base.layers)
    made = replace(base, layers=layers)
    return Recipe(made, names(config), interleaved=config.format == "gguf")
