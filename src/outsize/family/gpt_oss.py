"""gpt-oss: experts with biases and a clamped gated activation, attention that may look at nothing (sinks),
every other layer in a sliding window, YaRN positions.

MXFP4 weights keep their values exactly (5-bit groups), from a GGUF and from safetensors, which store them in
two tensors a matrix.
"""

from __future__ import annotations

from dataclasses import replace

from outsize.errors import CheckpointError, UnsupportedError
from outsize.family.common import GGUF_NAMES, describe, mixture, names, window, with_names
from outsize.family.description import Config, Layer, Recipe, Rope, yarn

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
LIMIT, ORIGINAL = 7.0, 4096


def recipe(config: Config) -> Recipe:
    if config.get("swiglu_limit") not in (None, LIMIT):
        raise UnsupportedError(f"swiglu_limit {config.get('swiglu_limit')!r} is not known; 7.0 is")
    base = describe(config)
    mixed = replace(mixture(config, "num_local_experts", "intermediate_size", True), bias=True)
    made = replace(
        base, layers=_layers(config, base.num_layers), mixture=mixed, ffn_width=mixed.width,
        activation="clamped_swiglu", qkv_bias=True, o_bias=True, sinks=True,
    )  # fmt: skip
    if config.format == "gguf":
        own = dict(GGUF_NAMES) | {"ffn_norm": "blk.{i}.post_attention_norm.weight"}
        return Recipe(made, own, interleaved=False)
    return Recipe(made, names(config, HF_LAYER), interleaved=False, paired=True)


def _layers(config: Config, count: int) -> tuple[Layer, ...]:
    rope = _gguf_rope(config) if config.format == "gguf" else config.rope()
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count:
        raise CheckpointError(f"config: layer_types does not list {count} layers")
    return tuple(Layer(rope, window(config) if k == "sliding_attention" else None) for k in kinds)


def _gguf_rope(config: Config) -> Rope:
    table = {
        "factor": config.number("rope.scaling.factor", 32.0),
        "original_max_position_embeddings": config.integer(
            "rope.scaling.original_context_length", ORIGINAL
        ),
        "truncate": False,
    }
    return yarn(table, config.number("rope_theta", 150_000.0), config.integer("head_dim", 64))
