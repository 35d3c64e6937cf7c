"""Granite 3 with experts: Granite's multipliers, and experts whose gate and up are one tensor of all."""

from __future__ import annotations

from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family import granite
from outsize.family.common import GATED, mixture, names, with_names
from outsize.family.config import Config
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **{k: v for k, v in granite.DEFAULTS.items() if k != "mlp_bias"},
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
GGUF_READ = granite.GGUF_READ
HF_LAYER = with_names(
    {
        "router": "block_sparse_moe.router.layer.weight",
        "expert_gate_up": "block_sparse_moe.input_linear.weight",
        "expert_down": "block_sparse_moe.output_linear.weight",
    }
)


def recipe(config: Config) -> Recipe:
    base, mixed = granite.multiplied(config), mixture(config, renorm=True)
    if any(config.has(f".ffn_{n}.bias") for n in GATED):
        raise UnsupportedError("biases of the feed-forward are not known for granitemoe")
    made = replace(base, mixture=mixed, ffn_width=mixed.width)
    return Recipe(made, names(config, HF_LAYER), interleaved=config.format == "gguf")
