"""OLMoE: 64 small experts, 8 used, whose weights are not made to sum to 1; one norm over all query heads,
one over all key heads."""

from __future__ import annotations

from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family.common import EXPERTS, describe, mixture, names, with_names
from outsize.family.description import Config, Recipe


def recipe(config: Config) -> Recipe:
    if config.get("clip_qkv") is not None:
        raise UnsupportedError(f"clip_qkv {config.get('clip_qkv')!r} is not known; null is")
    renorm = config.get("norm_topk_prob") is True
    mixed = mixture(config, "num_experts", "intermediate_size", renorm)
    base = replace(describe(config), qk_norm_whole=True)
    made = replace(base, mixture=mixed, ffn_width=mixed.width)
    return Recipe(made, names(config, with_names(EXPERTS)), interleaved=False)
