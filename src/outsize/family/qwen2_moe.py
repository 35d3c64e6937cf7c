"""Qwen1.5-MoE and Qwen2-57B-A14B: Qwen2 with experts whose weights are not made to sum to 1, and one more
that every token uses, weighed by a sigmoid of its own."""

from __future__ import annotations

from dataclasses import replace

from outsize.family import common
from outsize.family.common import EXPERTS, GATED, HEEDED, WINDOWS, describe, mixture, names
from outsize.family.config import Config
from outsize.family.recipe import Recipe
from outsize.model_config import Layer

DEFAULTS: dict[str, object] = {
    **HEEDED,
    **WINDOWS,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32_768,
    "num_local_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "norm_topk_prob": False,
    "max_window_layers": 28,
    "layer_types": None,
}  # fmt: skip
FIXED: dict[str, tuple[object, ...]] = {
    "decoder_sparse_step": (1,), "mlp_only_layers": (None, []), "qkv_bias": (True,),
}  # fmt: skip
GGUF_READ = ("shared_expert_intermediate_size",)
HF_LAYER = common.with_names(
    {
        **EXPERTS,
        **{f"shared_{n}": f"mlp.shared_expert.{n}_proj.weight" for n in GATED},
        "shared_router": "mlp.shared_expert_gate.weight",
    }
)


def recipe(config: Config) -> Recipe:
    base, is_gguf = describe(config), config.format == "gguf"
    renorm = not is_gguf and config.flag("norm_topk_prob")
    mixed = replace(
        mixture(config, renorm, "moe_intermediate_size"),
        shared=config.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    layers = base.layers if is_gguf else _layers(config, base.layers)
    made = replace(base, qkv_bias=True, mixture=mixed, ffn_width=mixed.width, layers=layers)
    return Recipe(made, names(config, HF_LAYER), interleaved=False)


def _layers(config: Config, plain: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Windows are of the layers of that type, or of every other one of the first `max_window_layers`."""
    reach, first = common.window(config), config.count("max_window_layers")
    has = [reach is not None and i % 2 == 0 and i < first for i in range(len(plain))]
    if config.get("layer_types") is not None:
        has = common.sliding(config, len(plain), 1)
    return tuple(replace(p, window=reach if h else None) for p, h in zip(plain, has, strict=True))
