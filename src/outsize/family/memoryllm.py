"""MemoryLLM and Flex-MemoryLLM (arXiv 2602.00398): llama's attention; each feed-forward reads the token's
embedding, through a norm of its own, and adds to the residual stream beside attention. In Flex a smaller
feed-forward reads the residual stream, too, after attention.

No published checkpoint is known: this is the layout that `outsize adapt memory` writes. The paper leaves open
what Flex's second part is; ours is a gated one of a third of beta * width, so that it has beta * width^2
numbers.
"""

from __future__ import annotations

from dataclasses import replace

from outsize.family import llama
from outsize.family.common import GATED, describe, names, with_names
from outsize.family.config import Config
from outsize.family.recipe import Recipe
from outsize.model_config import Memory

DEFAULTS: dict[str, object] = {**llama.DEFAULTS, "dense_intermediate_size": 0}
FIXED: dict[str, tuple[object, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}
LAYER = with_names(
    {
        "ffn_norm": "memory_layernorm.weight",
        "dense_norm": "post_attention_layernorm.weight",
        **{f"dense_{n}": f"dense_mlp.{n}_proj.weight" for n in GATED},
    }
)


def recipe(config: Config) -> Recipe:
    memory = Memory(dense=config.count("dense_intermediate_size"))
    return Recipe(replace(describe(config), memory=memory), names(config, LAYER), interleaved=False)
