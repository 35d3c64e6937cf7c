"""Qwen3 with experts (30B-A3B, 235B-A22B): 128 small ones, 8 used."""

from __future__ import annotations

from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family.common import EXPERTS, describe, mixture, names, with_names
from outsize.family.description import Config, Recipe


def recipe(config: Config) -> Recipe:
    dense, step = config.get("mlp_only_layers"), config.get("decoder_sparse_step")
    if dense or step not in (None, 1):
        raise UnsupportedError(
            f"layers without experts (mlp_only_layers {dense!r}, decoder_sparse_step {step!r}) are not "
            "known; every layer is expected to have them"
        )
    renorm = config.format == "gguf" or config.get("norm_topk_prob") is True
    mixed = mixture(config, "num_experts", "moe_intermediate_size", renorm)
    made = replace(describe(config), qk_norm=True, mixture=mixed, ffn_width=mixed.width)
    return Recipe(made, names(config, with_names(EXPERTS)), interleaved=False)
