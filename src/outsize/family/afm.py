"""Apple's on-device foundation model of 2024 (arXiv 2407.21075): the architecture, not its weights.

Shared input and output embedding, a norm on each query and key head, grouped heads, SwiGLU, rope
base 500,000. Checkpoints use Qwen3's tensor names; transformers has no class of it.
"""

from __future__ import annotations

from outsize.family import qwen3
from outsize.family.config import Config
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **qwen3.DEFAULTS,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}


def recipe(config: Config) -> Recipe:
    return qwen3.recipe(config)
