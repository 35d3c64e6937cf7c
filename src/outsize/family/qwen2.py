"""Qwen2 and Qwen2.5: llama with biases on query, key and value."""

from __future__ import annotations

from dataclasses import replace

from outsize.family.common import describe, names
from outsize.family.description import Config, Recipe


def recipe(config: Config) -> Recipe:
    return Recipe(replace(describe(config), qkv_bias=True), names(config), interleaved=False)
