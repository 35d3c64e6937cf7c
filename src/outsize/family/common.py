"""What the families share: the usual config keys and the usual tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from outsize.errors import CheckpointError, UnsupportedError
from outsize.family import rope
from outsize.family.config import Config
from outsize.model_config import Description, Layer, Mixture

GATED = ("gate", "up", "down")
SIGMOID = 2  # in a GGUF's expert_gating_func
GGUF_NAMES: Mapping[str, str] = {
    "embed": "token_embd.weight",
    "head": "output.weight",
    "final_norm": "output_norm.weight",
    "attn_norm": "blk.{i}.attn_norm.weight",
    **{n: f"blk.{{i}}.attn_{n}.weight" for n in "qkv"},
    **{f"{n}_bias": f"blk.{{i}}.attn_{n}.bias" for n in "qkv"},
    **{f"{n}_norm": f"blk.{{i}}.attn_{n}_norm.weight" for n in "qk"},
    "o": "blk.{i}.attn_output.weight",
    "o_bias": "blk.{i}.attn_output.bias",
    "sinks": "blk.{i}.attn_sinks.weight",
    "attn_post_norm": "blk.{i}.post_attention_norm.weight",
    "ffn_norm": "blk.{i}.ffn_norm.weight",
    **{n: f"blk.{{i}}.ffn_{n}.weight" for n in GATED},
    **{f"{n}_bias": f"blk.{{i}}.ffn_{n}.bias" for n in GATED},
    "ffn_post_norm": "blk.{i}.post_ffw_norm.weight",
    "router": "blk.{i}.ffn_gate_inp.weight",
    "router_bias": "blk.{i}.ffn_gate_inp.bias",
    **{f"expert_{n}": f"blk.{{i}}.ffn_{n}_exps.weight" for n in GATED},
    **{f"expert_{n}_bias": f"blk.{{i}}.ffn_{n}_exps.bias" for n in GATED},
    "choice_bias": "blk.{i}.exp_probs_b.bias",
    **{f"shared_{n}": f"blk.{{i}}.ffn_{n}_shexp.weight" for n in GATED},
    "shared_router": "blk.{i}.ffn_gate_inp_shexp.weight",
}
NOTHING: Mapping[str, str] = {}
GGUF_FUSED = "blk.{i}.ffn_gate_up_exps.weight"  # of each expert gate's rows, then up's
GGUF_SINGLE = {f"expert_{k}": f"blk.{{i}}.ffn_{k}.{{e}}.weight" for k in GATED}
EXPERTS = {
    "router": "mlp.gate.weight",
    **{f"expert_{n}": f"mlp.experts.{{e}}.{n}_proj.weight" for n in GATED},
}
MIXTRAL = {  # the layout of Mixtral's first checkpoints
    "router": "block_sparse_moe.gate.weight",
    "expert_gate": "block_sparse_moe.experts.{e}.w1.weight",
    "expert_up": "block_sparse_moe.experts.{e}.w3.weight",
    "expert_down": "block_sparse_moe.experts.{e}.w2.weight",
}
SHARED = {
    **EXPERTS,
    "choice_bias": "mlp.gate.e_score_correction_bias",
    **{f"shared_{n}": f"mlp.shared_experts.{n}_proj.weight" for n in GATED},
}
FUSED = "mlp.experts.gate_up_proj"
_LAYER = {
    "attn_norm": "input_layernorm.weight",
    **{n: f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"{n}_bias": f"self_attn.{n}_proj.bias" for n in "qkvo"},
    **{f"{n}_norm": f"self_attn.{n}_norm.weight" for n in "qk"},
    "ffn_norm": "post_attention_layernorm.weight",
    **{n: f"mlp.{n}_proj.weight" for n in GATED},
    **{f"{n}_bias": f"mlp.{n}_proj.bias" for n in GATED},
}
# Norms after each half, and none before.
POST_NORMED = {
    **{k: v for k, v in _LAYER.items() if k not in ("attn_norm", "ffn_norm")},
    "attn_post_norm": "post_attention_layernorm.weight",
    "ffn_post_norm": "post_feedforward_layernorm.weight",
}
# What the usual configs heed. A family's DEFAULTS say what transformers' class takes for a key that is
# left out (tests/laws/test_config_keys.py); the sizes of a published model come with it.
HEEDED: Mapping[str, object] = {
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "original_max_position_embeddings": None,
    "tie_word_embeddings": False,
    "vocab_size": None,
}
WINDOWS: Mapping[str, object] = {"use_sliding_window": False, "sliding_window": 4096}
ACTIVATIONS = {
    "silu": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def names(
    config: Config, layer: Mapping[str, str] = _LAYER, gguf: Mapping[str, str] = NOTHING
) -> Mapping[str, str]:
    """Our tensor names -> the checkpoint's. `gguf`: what a family's GGUF files call otherwise."""
    if config.format == "gguf":
        return {**_gguf_names(config), **gguf}
    if "expert_gate_up" not in layer and config.has(FUSED):
        layer = {
            **layer,
            **EXPERTS,
            "expert_gate_up": FUSED,
            "expert_down": "mlp.experts.down_proj",
        }
    prefixes = ("model.", "model.language_model.", "language_model.model.")
    found = [p for p in prefixes if f"{p}embed_tokens.weight" in config.names]
    prefix = found[0] if found else "model."
    top = {"embed": f"{prefix}embed_tokens.weight", "final_norm": f"{prefix}norm.weight"}
    head = "lm_head.weight"
    if prefix == "language_model.model." and head not in config.names:
        head = "language_model.lm_head.weight"
    return top | {"head": head} | {k: f"{prefix}layers.{{i}}.{v}" for k, v in layer.items()}


def _gguf_names(config: Config) -> Mapping[str, str]:
    """Experts are stacked by matrix; since 2026 also with gate and up as one; in 2023 each lay apart."""
    if GGUF_FUSED.replace("{i}", "0") in config.names:
        return {**GGUF_NAMES, "expert_gate_up": GGUF_FUSED}
    if GGUF_SINGLE["expert_gate"].replace("{i}", "0").replace("{e}", "0") in config.names:
        return {**GGUF_NAMES, **GGUF_SINGLE}
    return GGUF_NAMES


def with_names(changes: Mapping[str, str]) -> Mapping[str, str]:
    """The usual Hugging Face layer names, with a family's own."""
    return _LAYER | dict(changes)


def describe(config: Config, kind: str = "") -> Description:
    """A plain llama-like decoder from the usual keys; a family replaces what it does otherwise. `kind`:
    the layers whose rope it is, where the config tells them apart."""
    width, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    num_kv_heads, head_dim = config.integer("num_key_value_heads", num_heads), config.head_dim
    if num_heads % num_kv_heads or head_dim % 2:
        raise CheckpointError(
            f"config: {num_heads} heads over {num_kv_heads} key heads of {head_dim} numbers; "
            "heads must divide evenly and have an even size"
        )
    layer = Layer(rope.rope(config, kind))
    qkv_bias, o_bias, mlp_bias = _biases(config)
    return Description(
        family=config.architecture,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_width=config.integer("intermediate_size", config.integer("moe_intermediate_size", 1)),
        vocab_size=_vocab_size(config),
        context=rope.context(config, kind),
        norm_eps=config.number("rms_norm_eps"),
        attn_scale=head_dim**-0.5,
        layers=(layer,) * config.integer("num_hidden_layers"),
        activation=activation(config, "hidden_act"),
        tied=is_tied(config),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
    )


def _biases(config: Config) -> tuple[bool, bool, bool]:
    """Of query, key and value; of the output map; of a dense feed-forward. A GGUF's tensors tell."""
    if config.format == "gguf":
        qkv = any(config.has(f".attn_{k}.bias") for k in "qkv")
        mlp = any(config.has(f".ffn_{k}.bias") for k in GATED)
        return qkv, config.has(".attn_output.bias"), mlp
    attention = config.flag("attention_bias")
    return attention, attention, config.flag("mlp_bias")


def _vocab_size(config: Config) -> int:
    stated = config.get("vocab_size") if config.format != "gguf" else None
    if stated not in (None, config.vocab_size):
        raise CheckpointError(
            f"config: vocab_size is {stated!r}, the embedding has {config.vocab_size:,} rows"
        )
    return config.vocab_size


def activation(config: Config, key: str) -> str:
    """Our name of it. GGUF files do not say."""
    said = "silu" if config.format == "gguf" else config.get(key)
    if not isinstance(said, str) or said not in ACTIVATIONS:
        raise UnsupportedError(
            f"config: {key} {said!r} is not known; known are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[said]


def mixture(config: Config, renorm: bool, width: str = "intermediate_size") -> Mixture:
    """The experts; `width` is the key of one's, where a GGUF has none for it."""
    if config.format == "gguf" and config.get("moe_intermediate_size"):
        width = "moe_intermediate_size"
    count, used = config.integer("num_local_experts"), config.integer("num_experts_per_tok")
    made = Mixture(count, used, config.integer(width), renorm)
    if made.used > made.count:
        raise CheckpointError(f"config: {made.used} experts a token of {made.count} there are")
    return made


def sigmoid_mixture(config: Config) -> Mixture:
    """Experts as DeepSeek V3 and GLM 4.5 route them: by sigmoids, with a bias for choosing, in groups; an
    expert for all tokens beside."""
    made = mixture(config, config.flag("norm_topk_prob"), "moe_intermediate_size")
    return replace(
        made,
        score=sigmoid(config),
        choice_bias=config.format != "gguf" or config.has(".exp_probs_b.bias"),
        groups=config.count("n_group", 1) or 1,
        used_groups=config.count("topk_group", 1) or 1,
        scale=config.number("routed_scaling_factor", 1.0),
        shared=made.width * config.count("n_shared_experts"),
    )


def sigmoid(config: Config) -> str:
    """What weighs experts. Raises UnsupportedError for a GGUF that says otherwise."""
    if config.format == "gguf" and config.get("scoring_func") not in (None, SIGMOID):
        raise UnsupportedError(
            f"config: {config.key('scoring_func')} is {config.get('scoring_func')!r}; sigmoid "
            f"({SIGMOID}) is known"
        )
    return "sigmoid"


def first_dense(config: Config, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The layers, of which the first ones have no experts."""
    count = config.count("first_k_dense_replace")
    return tuple(replace(layer, dense=i < count) for i, layer in enumerate(layers))


def without_next(config: Config) -> tuple[Config, tuple[str, ...]]:
    """The config without the layers that predict further tokens, which a GGUF counts as layers; and what
    their tensors are called, which nothing uses."""
    more, count = config.count("num_nextn_predict_layers"), config.integer("num_hidden_layers")
    if not more:
        return config, ()
    if config.format == "gguf":
        if more >= count:
            raise CheckpointError(f"config: {more} of {count} layers predict further tokens")
        count -= more
        values = {**config.values, config.key("num_hidden_layers"): count}
        config = replace(config, values=values)
    prefix = r"blk\." if config.format == "gguf" else r"model\.layers\."
    return config, tuple(rf"{prefix}{count + i}\..*" for i in range(more))


def is_tied(config: Config) -> bool:
    """Does the head share the embedding? A head of its own in the file is used whatever the config says,
    as transformers does; without one, a GGUF is tied, and a Hugging Face config must say so."""
    if names(config)["head"] in config.names:
        return False
    return config.format == "gguf" or config.flag("tie_word_embeddings")


def window(config: Config) -> int | None:
    """The sliding window, if the config has one and uses it."""
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return None
    return config.integer("sliding_window")


def positioned(config: Config, count: int, period: int) -> list[bool]:
    """Which layers have positions: as listed, or all but each `period`th."""
    said = None if config.format == "gguf" else config.get("no_rope_layers")
    if not said:
        return [(i + 1) % period != 0 for i in range(count)]
    if not isinstance(said, list) or len(said) != count or any(v not in (0, 1) for v in said):
        raise UnsupportedError(
            f"config: no_rope_layers must list 0 or 1 for each of {count} layers"
        )
    return [v == 1 for v in said]


def sliding(config: Config, count: int, period: int) -> list[bool]:
    """Which layers have a sliding window: by their stated types, or all but each `period`th."""
    kinds, pattern = config.get("layer_types"), config.get("sliding_window_pattern")
    if config.format == "gguf" and isinstance(pattern, list | bool):
        each = [pattern] * count if isinstance(pattern, bool) else pattern
        kinds = ["sliding_attention" if p else "full_attention" for p in each]
    if kinds is None:
        period = config.integer("sliding_window_pattern", period)
        return [(i + 1) % period != 0 for i in range(count)]
    known = isinstance(kinds, list) and all(kind in tuple(rope.LAYER_TYPES) for kind in kinds)
    if not isinstance(kinds, list) or not known or len(kinds) != count:
        raise UnsupportedError(
            f"config: layer_types must list sliding_attention or full_attention for each of {count} layers"
        )
    return [kind == "sliding_attention" for kind in kinds]
