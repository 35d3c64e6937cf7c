"""Apple's on-device foundation model of 2024 (arXiv 2407.21075): the architecture, not its weights.

Shared input and output embedding, a norm on each query and key head, grouped heads, SwiGLU, rope
base 500,000. Checkpoints use Qwen3's tensor names.
"""

from __future__ import annotations

from dataclasses import replace

from outsize.family.common import describe, names
from outsize.family.description import Config, Layer, Recipe, Rope


def recipe(config: Config) -> Recipe:
    base = describe(config)
    stated = config.get("rope_theta") or config.get("rope_parameters")
    layer = base.layers[0] if stated else Layer(Rope(500_000.0))
    made = replace(base, qk_norm=True, tied=True, layers=(layer,) * base.num_layers)
    return Recipe(made, names(config), interleaved=False)
