"""Qwen3 (dense): llama with a norm on each query and key head."""

from __future__ import annotations

from dataclasses import replace

from outsize.family.common import describe, names
from outsize.family.description import Config, Recipe


def recipe(config: Config) -> Recipe:
    return Recipe(replace(describe(config), qk_norm=True), names(config), interleaved=False)
