"""Mixtral: Mistral with 8 large experts, 2 used. Its GGUF files say "llama"."""

from __future__ import annotations

from dataclasses import replace

from outsize.family import mistral
from outsize.family.common import mixture, names, with_names
from outsize.family.description import Config, Recipe

HF_LAYER = with_names(
    {
        "router": "block_sparse_moe.gate.weight",
        "expert_gate": "block_sparse_moe.experts.{e}.w1.weight",
        "expert_up": "block_sparse_moe.experts.{e}.w3.weight",
        "expert_down": "block_sparse_moe.experts.{e}.w2.weight",
    }
)


def recipe(config: Config) -> Recipe:
    base = mistral.recipe(config)
    mixed = mixture(config, "num_local_experts", "intermediate_size", renorm=True)
    made = replace(base.description, mixture=mixed, ffn_width=mixed.width)
    return replace(base, description=made, names=names(config, HF_LAYER))
