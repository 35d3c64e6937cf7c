"""Qwen3 (dense): llama with a norm on each query and key head."""

from __future__ import annotations

from dataclasses import replace

from outsize.family import qwen2
from outsize.family.common import describe, names
from outsize.family.config import Config
from outsize.model_config import Recipe

DEFAULTS: dict[str, object] = {**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False}
FIXED: dict[str, tuple[object, ...]] = {}


def recipe(config: Config) -> Recipe:
    base = describe(config)
    made = replace(base, qk_norm=True, layers=qwen2.layers(config, base.layers))
    return Recipe(made, names(config), interleaved=False)
