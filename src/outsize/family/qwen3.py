"""Qwen3 (dense): llama with a norm on each query and key head.

The smallest family, and the example: to add one is to add such a file. `DEFAULTS` are the config's keys that
are read, with what transformers takes where one is left out; `recipe` says what differs from llama
(`describe`), and what the checkpoint calls its tensors (`names`).
"""

from __future__ import annotations

from dataclasses import replace

from outsize.family import qwen2
from outsize.family.common import describe, names
from outsize.family.config import Config
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False}


def recipe(config: Config) -> Recipe:
    base = describe(config)
    made = replace(base, qk_norm=True, layers=qwen2.layers(config, base.layers))
    return Recipe(made, names(config), interleaved=False)
