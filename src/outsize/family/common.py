"""What the families share: the usual config keys and the usual tensor names."""

from __future__ import annotations

from collections.abc import Mapping

from outsize.errors import CheckpointError
from outsize.family.description import Config, Description, Layer, Mixture

GGUF_NAMES: Mapping[str, str] = {
    "embed": "token_embd.weight",
    "head": "output.weight",
    "final_norm": "output_norm.weight",
    "attn_norm": "blk.{i}.attn_norm.weight",
    "q": "blk.{i}.attn_q.weight",
    "k": "blk.{i}.attn_k.weight",
    "v": "blk.{i}.attn_v.weight",
    "o": "blk.{i}.attn_output.weight",
    "q_bias": "blk.{i}.attn_q.bias",
    "k_bias": "blk.{i}.attn_k.bias",
    "v_bias": "blk.{i}.attn_v.bias",
    "q_norm": "blk.{i}.attn_q_norm.weight",
    "k_norm": "blk.{i}.attn_k_norm.weight",
    "attn_post_norm": "blk.{i}.post_attention_norm.weight",
    "ffn_norm": "blk.{i}.ffn_norm.weight",
    "gate": "blk.{i}.ffn_gate.weight",
    "up": "blk.{i}.ffn_up.weight",
    "down": "blk.{i}.ffn_down.weight",
    "ffn_post_norm": "blk.{i}.post_ffw_norm.weight",
    "router": "blk.{i}.ffn_gate_inp.weight",
    "expert_gate": "blk.{i}.ffn_gate_exps.weight",
    "expert_up": "blk.{i}.ffn_up_exps.weight",
    "expert_down": "blk.{i}.ffn_down_exps.weight",
    "router_bias": "blk.{i}.ffn_gate_inp.bias",
    "expert_gate_bias": "blk.{i}.ffn_gate_exps.bias",
    "expert_up_bias": "blk.{i}.ffn_up_exps.bias",
    "expert_down_bias": "blk.{i}.ffn_down_exps.bias",
    "o_bias": "blk.{i}.attn_output.bias",
    "sinks": "blk.{i}.attn_sinks.weight",
}
EXPERTS = {
    "router": "mlp.gate.weight",
    "expert_gate": "mlp.experts.{e}.gate_proj.weight",
    "expert_up": "mlp.experts.{e}.up_proj.weight",
    "expert_down": "mlp.experts.{e}.down_proj.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def names(config: Config, layer: Mapping[str, str] = _LAYER) -> Mapping[str, str]:
    """Our tensor names -> the checkpoint's."""
    if config.format == "gguf":
        return GGUF_NAMES
    prefixes = ("model.", "model.language_model.", "language_model.model.")
    found = [p for p in prefixes if f"{p}embed_tokens.weight" in config.names]
    prefix = found[0] if found else "model."
    top = {"embed": f"{prefix}embed_tokens.weight", "final_norm": f"{prefix}norm.weight"}
    head = (
        "lm_head.weight" if prefix != "language_model.model." else "language_model.lm_head.weight"
    )
    return top | {"head": head} | {k: f"{prefix}layers.{{i}}.{v}" for k, v in layer.items()}


def with_names(changes: Mapping[str, str]) -> Mapping[str, str]:
    """The usual Hugging Face layer names, with a family's own."""
    return _LAYER | dict(changes)


def describe(config: Config, context: int = 4096) -> Description:
    """A plain llama-like decoder from the usual keys; a family replaces what it does otherwise."""
    width, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    head_dim = config.integer("head_dim", max(1, width // num_heads))
    if num_heads % num_kv_heads or head_dim % 2:
        raise CheckpointError(
            f"config: {num_heads} heads over {num_kv_heads} key heads of {head_dim} numbers; "
            "heads must divide evenly and have an even size"
        )
    layer = Layer(config.rope())
    return Description(
        family=config.architecture,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_width=config.integer("intermediate_size", config.integer("moe_intermediate_size", 1)),
        vocab_size=config.vocab_size,
        context=config.integer("max_position_embeddings", context),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        attn_scale=head_dim**-0.5,
        layers=(layer,) * config.integer("num_hidden_layers"),
        tied=is_tied(config),
    )


def mixture(config: Config, count: str, width: str, renorm: bool) -> Mixture:
    """The experts, under the names that this family gives their number and their width."""
    if config.format == "gguf":
        count = "num_experts"
        width = (
            "moe_intermediate_size" if config.get("moe_intermediate_size") else "intermediate_size"
        )
    made = Mixture(
        config.integer(count), config.integer("num_experts_per_tok"), config.integer(width), renorm
    )
    if made.used > made.count:
        raise CheckpointError(f"config: {made.used} experts a token of {made.count} there are")
    return made


def is_tied(config: Config) -> bool:
    """A checkpoint without a head of its own uses its embedding."""
    return names(config)["head"] not in config.names or config.get("tie_word_embeddings") is True


def window(config: Config) -> int | None:
    """The sliding window, if the config has one and uses it."""
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return None
    return config.integer("sliding_window")
