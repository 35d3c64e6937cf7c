"""What families with layers of the gated delta rule share: sizes, kinds of layers, tensors' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from outsize.errors import CheckpointError, UnsupportedError
from outsize.family import common
from outsize.family.common import EXPERTS, GATED, HEEDED
from outsize.family.config import Config
from outsize.family.recipe import Strip
from outsize.model_config import Description, Layer, Mixture
from outsize.model_parts import Delta

DEFAULTS: dict[str, object] = {
    **HEEDED,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "attention_bias": False,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": None,
    "full_attention_interval": 4,
}
MIXED: dict[str, object] = {
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
FIXED: dict[str, tuple[object, ...]] = {"attn_output_gate": (None, True)}
GGUF_READ = (
    "rotary_dim", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_num_key_heads",
    "linear_num_value_heads", "linear_values", "full_attention_interval",
)  # fmt: skip
KINDS = {"linear_attention": "delta", "full_attention": "attention"}
HF = {
    "q_gate": "self_attn.q_proj.weight",
    "delta_gain": "linear_attn.norm.weight",
    "delta_conv": "linear_attn.conv1d.weight",
    "delta_decay": "linear_attn.A_log",
    "delta_shift": "linear_attn.dt_bias",
    "delta_o": "linear_attn.out_proj.weight",
}
GGUF = {
    "ffn_norm": "blk.{i}.post_attention_norm.weight",
    "q_gate": "blk.{i}.attn_q.weight",
    "delta_gain": "blk.{i}.ssm_norm.weight",
    "delta_conv": "blk.{i}.ssm_conv1d.weight",
    "delta_decay": "blk.{i}.ssm_a",
    "delta_shift": "blk.{i}.ssm_dt.bias",
    "delta_o": "blk.{i}.ssm_out.weight",
    "delta_qkv": "blk.{i}.attn_qkv.weight",
    "delta_z": "blk.{i}.attn_gate.weight",
}
SHARED = {
    **{f"shared_{n}": f"mlp.shared_expert.{n}_proj.weight" for n in GATED},
    "shared_router": "mlp.shared_expert_gate.weight",
}
# Of images, and of layers that predict further tokens.
SPARES = (r"(model\.)?visual\..*", r"mtp\..*", r"(v|mm)\..*")


def described(config: Config) -> Description:
    """A decoder whose layers are of attention, gated, or of the gated delta rule."""
    base, sizes = common.describe(config), _sizes(config)
    if base.qkv_bias or base.o_bias or base.mlp_bias:
        raise UnsupportedError(f"config: biases are not known for {config.architecture}")
    return replace(base, qk_norm=True, gated=True, delta=sizes, layers=_layers(config, base.layers))


def _sizes(config: Config) -> Delta:
    key_heads = config.integer("linear_num_key_heads")
    value_heads = config.integer("linear_num_value_heads")
    if config.format == "gguf":
        values = config.integer("linear_values")
        value = values // value_heads
    else:
        value = config.integer("linear_value_head_dim")
        values = value * value_heads
    if value_heads % key_heads or values % value_heads:
        raise CheckpointError(
            f"config: {values:,} numbers in {value_heads} value heads over {key_heads} key heads of the "
            "gated delta rule; they must divide evenly"
        )
    key, kernel = config.integer("linear_key_head_dim"), config.integer("linear_conv_kernel_dim")
    return Delta(key_heads, value_heads, key, value, kernel, is_log=config.format != "gguf")


def _layers(config: Config, plain: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """As listed, or attention in each layer of a period."""
    count, kinds = len(plain), config.get("layer_types")
    if kinds is None:
        period = config.integer("full_attention_interval", 4)
        kinds = ["linear_attention" if (i + 1) % period else "full_attention" for i in range(count)]
    if (
        not isinstance(kinds, list)
        or len(kinds) != count
        or any(k not in tuple(KINDS) for k in kinds)
    ):
        raise UnsupportedError(
            f"config: layer_types must list linear_attention or full_attention for each of {count} layers"
        )
    return tuple(replace(p, mixer=KINDS[k]) for p, k in zip(plain, kinds, strict=True))


def mixture(config: Config, renorm: bool) -> Mixture:
    """Experts, and one that every token uses, weighed by a sigmoid of its own."""
    made = common.mixture(config, renorm, "moe_intermediate_size")
    shared = config.integer("shared_expert_intermediate_size")
    return replace(made, shared=shared, shared_gate=True)


def names(config: Config, own: Mapping[str, str], gguf: Mapping[str, str]) -> Mapping[str, str]:
    """Our tensor names -> the checkpoint's. `own`, `gguf`: a family's."""
    layer = common.with_names({**EXPERTS, **SHARED, **HF, **own})
    found = common.names(config, layer, {**GGUF, **gguf})
    return {k: v for k, v in found.items() if k != "q"}


def strips(d: Description, whole: bool) -> Mapping[str, Strip]:
    """Parts of a checkpoint's tensors: each head's queries lie before its gate; inputs of the delta rule are
    one matrix, plain, or (`whole`) by key head with what gates the sums."""
    assert d.delta is not None
    x, size, out = d.delta, d.head_dim, dict[str, Strip]()
    out |= {
        "q": Strip("q_gate", 0, size, 2 * size),
        "attn_gate": Strip("q_gate", size, size, 2 * size),
    }
    each = x.value_heads // x.key_heads
    parts = {
        "delta_q": x.key,
        "delta_k": x.key,
        "delta_v": each * x.value,
        "delta_z": each * x.value,
    }
    if not whole:
        parts = {"delta_q": x.keys, "delta_k": x.keys, "delta_v": x.values}
    return out | _of("delta_inputs" if whole else "delta_qkv", parts)


def gate_strips(d: Description) -> Mapping[str, Strip]:
    """Of the maps of steps and decays, by key head in one matrix."""
    assert d.delta is not None
    each = d.delta.value_heads // d.delta.key_heads
    return _of("delta_ba", {"delta_b": each, "delta_a": each})


def _of(whole: str, parts: Mapping[str, int]) -> dict[str, Strip]:
    """Parts that follow each other, again and again."""
    out, at, every = {}, 0, sum(parts.values())
    for name, size in parts.items():
        out[name] = Strip(whole, at, size, every)
        at += size
    return out
