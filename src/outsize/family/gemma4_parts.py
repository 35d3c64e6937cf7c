"""What Gemma 4's configs say of layers, in either format, and what their files call tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from outsize.errors import CheckpointError, UnsupportedError
from outsize.family import common
from outsize.family.common import GATED, sliding, with_names
from outsize.family.config import Config
from outsize.family.rope import rope
from outsize.family.yarn import positive
from outsize.model_config import Description, Layer, Mixture, Rope

PERIOD = 6
ROPES = {  # where a config says nothing
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
}
FAR = 1e30  # divides the angles of pairs that do not rotate, as in GGUF files
ROPE_KEYS = {"rope_type", "rope_theta", "partial_rotary_factor", "factor"}
SIZES: Mapping[str, object] = {  # of transformers' class
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "sliding_window": 512,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
    "num_local_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
}
# Of the halves for images and sounds, in one file with the text's.
SPARES = (
    r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector)\..*",
    r"(v|a|mm)\..*",
)
LAYER = {
    **with_names(
        {
            "attn_post_norm": "post_attention_layernorm.weight",
            "ffn_norm": "pre_feedforward_layernorm.weight",
            "ffn_post_norm": "post_feedforward_layernorm.weight",
        }
    ),
    "out_scale": "layer_scalar",
    "token_gate": "per_layer_input_gate.weight",
    "token_down": "per_layer_projection.weight",
    "token_post_norm": "post_per_layer_input_norm.weight",
    "experts_norm": "pre_feedforward_layernorm_2.weight",
    "dense_post_norm": "post_feedforward_layernorm_1.weight",
    "experts_post_norm": "post_feedforward_layernorm_2.weight",
    "router": "router.proj.weight",
    "router_scale": "router.scale",
    "expert_scale": "router.per_expert_scale",
    "expert_gate_up": "experts.gate_up_proj",
    "expert_down": "experts.down_proj",
    **{f"shared_{n}": f"mlp.{n}_proj.weight" for n in GATED},
}
GGUF_LAYER = {
    "out_scale": "blk.{i}.layer_output_scale.weight",
    "token_gate": "blk.{i}.inp_gate.weight",
    "token_down": "blk.{i}.proj.weight",
    "token_post_norm": "blk.{i}.post_norm.weight",
    "experts_norm": "blk.{i}.pre_ffw_norm_2.weight",
    "dense_post_norm": "blk.{i}.post_ffw_norm_1.weight",
    "experts_post_norm": "blk.{i}.post_ffw_norm_2.weight",
    "router_scale": "blk.{i}.ffn_gate_inp.scale",
    "expert_scale": "blk.{i}.ffn_down_exps.scale",
    **{f"shared_{n}": f"blk.{{i}}.ffn_{n}.weight" for n in GATED},
}
TOP = {  # of all layers
    "token_rows": ("embed_tokens_per_layer.weight", "per_layer_token_embd.weight"),
    "token_context": ("per_layer_model_projection.weight", "per_layer_model_proj.weight"),
    "token_norm": ("per_layer_projection_norm.weight", "per_layer_proj_norm.weight"),
}


def usual(config: Config) -> Config:
    """The config as of a model whose layers all have a window. A GGUF's own sizes are those of the others."""
    if config.format != "gguf":
        ropes = config.table("rope_parameters") or ROPES
        more = {"num_experts_per_tok": config.get("top_k_experts"), "rope_parameters": ropes}
        return replace(config, values={**config.values, **more, "hidden_act": "silu"})
    count = config.integer("num_hidden_layers")
    first = _kinds(config, count).index(True)
    head = config.integer("swa_head_dim")
    for key in ("swa_value_length", "swa_rotary_dim"):
        if config.integer(key, head) != head:
            raise UnsupportedError(
                f"config: {config.key(key)} is {config.get(key)!r}; {head}, as of keys, is known"
            )
    own = {
        "head_dim": head,
        "rotary_dim": head,
        "num_key_value_heads": of_layers(config, "num_key_value_heads", count)[first],
        "intermediate_size": of_layers(config, "intermediate_size", count)[0],
        "rope_theta": config.number("rope_local_base_freq", 10_000.0),
    }
    # Scaled positions are those of layers that see all.
    kept = {k: v for k, v in config.values.items() if ".rope.scal" not in k}
    values = {**kept, **{config.key(k): v for k, v in own.items()}}
    return replace(config, values=values, divisors=())


def of_layers(config: Config, key: str, count: int) -> list[int]:
    """A whole number for each layer, where a config has one for all or a list. Raises CheckpointError."""
    value = config.get(key)
    if not isinstance(value, list):
        return [config.integer(key)] * count
    sound = len(value) == count and all(type(v) is int and 0 < v < 1 << 24 for v in value)
    if not sound:
        raise CheckpointError(
            f"config: {config.key(key)} lists {len(value):,} values, a positive number for each of {count} "
            "layers is due"
        )
    return [int(v) for v in value]


def _kinds(config: Config, count: int) -> list[bool]:
    """Which layers have a window. transformers' last one never has."""
    has = sliding(config, count, PERIOD)
    if config.format != "gguf":
        has = [*has[:-1], False]
    if len(set(has)) < 2:
        raise UnsupportedError(
            "config: all layers are of one kind; Gemma 4 has layers with a window, and without"
        )
    return has


def layers(config: Config, base: Description, window: int) -> tuple[Layer, ...]:
    """Those of the model; the last ones share keys and values with the last one before of their kind. Raises
    CheckpointError, UnsupportedError."""
    count = base.num_layers
    has, (head, heads) = _kinds(config, count), _global(config, base)
    own = 0 if head == base.head_dim else head, 0 if heads == base.num_kv_heads else heads
    near = Layer(base.layers[0].rope, window)
    far = Layer(_global_rope(config, head), head_dim=own[0], num_kv_heads=own[1])
    inner = _widths(config, base)
    first = count - config.count("num_kv_shared_layers")
    if first < 1 or {*has[:first]} != {*has}:
        raise CheckpointError(
            f"config: {count - first} of {count} layers share keys and values, and no layer before has those "
            "of their kind"
        )
    out = list[Layer]()
    for i, is_near in enumerate(has):
        shares = max(j for j in range(first) if has[j] == is_near) if i >= first else None
        width = 0 if inner[i] == base.ffn_width else inner[i]
        out.append(replace(near if is_near else far, shares=shares, ffn_width=width))
    return tuple(out)


def _widths(config: Config, base: Description) -> list[int]:
    """Of each layer's feed-forward."""
    count = base.num_layers
    if config.format == "gguf":
        return of_layers(config, "intermediate_size", count)
    shared = config.count("num_kv_shared_layers") if config.flag("use_double_wide_mlp") else 0
    return [base.ffn_width] * (count - shared) + [2 * base.ffn_width] * shared


def _global(config: Config, base: Description) -> tuple[int, int]:
    """Numbers of a head, and key heads, of layers that see all. Raises CheckpointError, UnsupportedError."""
    has = _kinds(config, base.num_layers)
    if config.format == "gguf":
        each_heads = of_layers(config, "num_key_value_heads", base.num_layers)
        return config.head_dim, each_heads[has.index(False)]
    stated = {str(k): v for k, v in config.table("per_layer_config").items()}
    if not stated and config.get("per_layer_config") is not None:  # as saved where all are alike
        return base.head_dim, base.num_kv_heads
    if not stated:
        same = base.num_kv_heads
        heads = config.integer("num_global_key_value_heads", same) if _equal(config) else same
        return config.integer("global_head_dim", base.head_dim), heads
    due = [str(i) for i, near in enumerate(has) if not near]
    each = list(stated.values())
    if (
        sorted(stated) != sorted(due)
        or any(x != each[0] for x in each)
        or not isinstance(each[0], dict)
    ):
        raise UnsupportedError(
            "config: per_layer_config names others than the layers without a window, or differs among them"
        )
    unknown = sorted(each[0].keys() - {"head_dim", "num_key_value_heads"})
    if unknown:
        raise UnsupportedError(
            f"config: per_layer_config has the key {unknown[0]!r}, which is not known"
        )
    sizes = replace(config, values={**config.values, **each[0]})
    return sizes.integer("head_dim"), sizes.integer("num_key_value_heads")


def _equal(config: Config) -> bool:
    """Are values of layers that see all made by keys' map?"""
    return config.flag("attention_k_eq_v")


def _global_rope(config: Config, head: int) -> Rope:
    if config.format == "gguf":
        if not config.divisors:
            raise CheckpointError(
                "tensor 'rope_freqs.weight' is missing, which says what of a head rotates; convert the "
                "model again"
            )
        return rope(config)
    table = (config.table("rope_parameters") or ROPES).get("full_attention")
    if not isinstance(table, dict) or table.get("rope_type") != "proportional":
        return rope(replace(config, values={**config.values, "head_dim": head}), "full_attention")
    strange = sorted(table.keys() - ROPE_KEYS)
    if strange:
        raise UnsupportedError(
            f"config: rope_parameters has the key {strange[0]!r}, which is not known of a proportional rope"
        )
    part, factor, base = (
        positive({"partial_rotary_factor": 1.0, "factor": 1.0, "rope_theta": 1e4, **table}, key)
        for key in ("partial_rotary_factor", "factor", "rope_theta")
    )
    count = int(min(part, 1.0) * head // 2)
    return Rope(base, (factor,) * count + (FAR,) * (head // 2 - count))


def values(
    config: Config, base: Description, own: Mapping[str, str]
) -> dict[int, Mapping[str, str]]:
    """Layers whose values are made by keys' map."""
    if config.format != "gguf" and not _equal(config):
        return {}
    full = [i for i, near in enumerate(_kinds(config, base.num_layers)) if not near]
    named = own["v"]
    lacks = [i for i in full if named.replace("{i}", str(i)) not in config.names]
    return {i: {"v": "k"} for i in (lacks if config.format == "gguf" else full)}


def top(config: Config, embed: str) -> dict[str, str]:
    """Names of tensors that are of all layers."""
    if config.format == "gguf":
        return {name: theirs for name, (_, theirs) in TOP.items()}
    prefix = embed.removesuffix("embed_tokens.weight")
    return {name: prefix + theirs for name, (theirs, _) in TOP.items()}


def spares(config: Config, shared: Sequence[int]) -> tuple[str, ...]:
    """Patterns of keys' and values' tensors in layers that make none."""
    some = "|".join(map(str, shared))
    if not some:
        return SPARES
    if config.format == "gguf":
        return (
            *SPARES,
            rf"blk\.({some})\.attn_(k|v|k_norm)\.weight",
        )
    return (
        *SPARES,
        rf".*layers\.({some})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.weight",
    )


def mixture(config: Config, width: int) -> Mixture | None:
    """The experts beside a dense feed-forward of this width, if there are some."""
    is_gguf = config.format == "gguf"
    if not (config.count("num_local_experts") if is_gguf else config.flag("enable_moe_block")):
        return None
    found = common.mixture(config, True, "moe_intermediate_size")
    return replace(found, shared=width, beside=True)
