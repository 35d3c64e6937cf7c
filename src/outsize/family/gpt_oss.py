"""gpt-oss: experts with biases and a clamped gated activation, attention that may look at nothing (sinks),
every other layer in a sliding window, YaRN positions.

MXFP4 weights keep their values exactly (5-bit groups), from a GGUF and from safetensors, which store them in
two tensors a matrix.
"""

from __future__ import annotations

from dataclasses import replace

from outsize.family.common import HEEDED, describe, mixture, names, sliding, window, with_names
from outsize.family.config import Config
from outsize.family.recipe import Recipe
from outsize.family.yarn import yarn
from outsize.model_config import Layer, Rope

ORIGINAL = 4096
YARN: dict[str, object] = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
DEFAULTS: dict[str, object] = {
    **HEEDED,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150_000.0,
    "rope_parameters": YARN,
    "attention_bias": True,
    "sliding_window": 128,
    "layer_types": None,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
}
FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",), "swiglu_alpha": (1.702,), "swiglu_limit": (None, 7.0),
}  # fmt: skip
HF_LAYER = with_names(
    {
        "sinks": "self_attn.sinks",
        "router": "mlp.router.weight",
        "router_bias": "mlp.router.bias",
        "expert_gate_up": "mlp.experts.gate_up_proj",
        "expert_gate_up_bias": "mlp.experts.gate_up_proj_bias",
        "expert_down": "mlp.experts.down_proj",
        "expert_down_bias": "mlp.experts.down_proj_bias",
    }
)


def recipe(config: Config) -> Recipe:
    base, is_gguf = describe(config), config.format == "gguf"
    mixed = replace(mixture(config, renorm=True), bias=True)
    reach, has = window(config), sliding(config, base.num_layers, 2)
    rope = _gguf_rope(config) if is_gguf else base.layers[0].rope
    made = replace(
        base, layers=tuple(Layer(rope, reach if h else None) for h in has), mixture=mixed,
        ffn_width=mixed.width, activation="clamped_swiglu", sinks=True,
        qkv_bias=base.qkv_bias or is_gguf, o_bias=base.o_bias or is_gguf,
    )  # fmt: skip
    if is_gguf:
        own = {**names(config), "ffn_norm": "blk.{i}.post_attention_norm.weight"}
        return Recipe(made, own, interleaved=False)
    return Recipe(made, names(config, HF_LAYER), interleaved=False, paired=True)


def _gguf_rope(config: Config) -> Rope:
    table = YARN | {
        "factor": config.number("rope.scaling.factor", 32.0),
        "original_max_position_embeddings": config.integer(
            "rope.scaling.original_context_length", ORIGINAL
        ),
    }
    return yarn(table, config.number("rope_theta", 150_000.0), config.integer("head_dim", 64))
