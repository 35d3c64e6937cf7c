"""Llama 4 (text): three of four layers attend within pieces of the context, the fourth sees all and has no
positions; experts whose inputs are weighed by a sigmoid, and one for all tokens."""

from __future__ import annotations

from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family.common import GATED, HEEDED, describe, mixture, names, positioned, with_names
from outsize.family.config import Config
from outsize.family.recipe import Recipe
from outsize.model_config import Layer

# What a GGUF does not say; nor whether heads are normed: all but the Maverick's are.
GGUF: dict[str, object] = {
    "attention_chunk_size": 8192, "attn_scale": 0.1, "floor_scale": 8192, "no_rope_layer_interval": 4,
    "attn_temperature_tuning": True,
}  # fmt: skip
MAVERICK = 128  # experts
DEFAULTS: dict[str, object] = {
    **HEEDED, **GGUF, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16_384,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
    "num_local_experts": 16, "num_experts_per_tok": 1, "moe_layers": None,
    "interleave_moe_layer_step": 1, "use_qk_norm": True, "no_rope_layers": None, "layer_types": None,
    "attention_bias": False,
}  # fmt: skip
GGUF_READ = ("interleave_moe_layer_step",)
SPARES = (r"vision_model\..*", r"multi_modal_projector\.linear_1\.weight")
HF_LAYER = with_names(
    {
        **{n: f"feed_forward.{n}_proj.weight" for n in GATED},
        "router": "feed_forward.router.weight",
        "expert_gate_up": "feed_forward.experts.gate_up_proj",
        "expert_down": "feed_forward.experts.down_proj",
        **{f"shared_{n}": f"feed_forward.shared_expert.{n}_proj.weight" for n in GATED},
    }
)
PIECES, WHOLE = KINDS = ("chunked_attention", "full_attention")


def recipe(config: Config) -> Recipe:
    base, is_gguf = describe(config), config.format == "gguf"
    mixed = mixture(config, renorm=False)
    if is_gguf:
        own = {**GGUF, "use_qk_norm": mixed.count != MAVERICK}
        config = replace(
            config, values={**config.values, **{config.key(k): v for k, v in own.items()}}
        )
    mixed = replace(mixed, score="sigmoid", weighs_input=True, shared=mixed.width)
    wide = base.ffn_width if is_gguf else config.integer("intermediate_size_mlp")
    made = replace(base, layers=_layers(config, base.layers), mixture=mixed, ffn_width=wide)
    return Recipe(made, names(config, HF_LAYER), True, spares=SPARES, turned=not is_gguf)


def _layers(config: Config, plain: tuple[Layer, ...]) -> tuple[Layer, ...]:
    count, size = len(plain), config.count("attention_chunk_size") or None
    period, step = (
        config.integer(k) for k in ("no_rope_layer_interval", "interleave_moe_layer_step")
    )
    turns, mixed = positioned(config, count, period), config.get("moe_layers")
    kinds = config.get("layer_types") or [PIECES if t and size else WHOLE for t in turns]
    mixed = [i for i in range(count) if (i + 1) % step == 0] if mixed is None else mixed
    if not isinstance(kinds, list) or len(kinds) != count or not all(k in KINDS for k in kinds):
        raise UnsupportedError(
            f"config: layer_types must list {' or '.join(KINDS)} for {count} layers"
        )
    if not isinstance(mixed, list) or not all(isinstance(i, int) and 0 <= i < count for i in mixed):
        raise UnsupportedError(f"config: moe_layers must list some of the {count} layers")
    far = replace(plain[0].rope, rotated=0, divisors=(), scale=1.0)
    if config.flag("attn_temperature_tuning"):
        growth, floor = config.number("attn_scale"), config.integer("floor_scale")
        far = replace(far, query_growth=growth, query_shift=1, original=floor)
    normed = config.flag("use_qk_norm")
    return tuple(
        Layer(p.rope, cut, i not in mixed, cut is not None, normed)
        if t
        else Layer(far, cut, i not in mixed, cut is not None)
        for i, (p, t, k) in enumerate(zip(plain, turns, kinds, strict=True))
        for cut in [size if k == PIECES else None]
    )
