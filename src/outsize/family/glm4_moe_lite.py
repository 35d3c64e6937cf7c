"""GLM 4.7 Flash: DeepSeek V3's blocks in other sizes. Its GGUF files say "deepseek2"."""

from __future__ import annotations

from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family import deepseek_v3
from outsize.family.config import Config
from outsize.family.further import behind
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **{k: v for k, v in deepseek_v3.DEFAULTS.items() if k != "first_k_dense_replace"},
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "max_position_embeddings": 202_752,
    "rms_norm_eps": 1e-5,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "num_local_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
    "mlp_layer_types": None,
}
FIXED: dict[str, tuple[object, ...]] = {
    **deepseek_v3.FIXED, "first_k_dense_replace": (None, 1), "partial_rotary_factor": (None, 1),
}  # fmt: skip
KINDS = ("dense", "sparse")


def recipe(config: Config) -> Recipe:
    made = deepseek_v3.recipe(config)
    kinds, d = config.get("mlp_layer_types"), made.description
    if kinds is None:
        kinds = [KINDS[i > 0] for i in range(d.num_layers)]
    if not isinstance(kinds, list) or len(kinds) != d.num_layers or not set(kinds) <= set(KINDS):
        raise UnsupportedError(
            f"config: mlp_layer_types must list {' or '.join(KINDS)} for each of {d.num_layers} layers"
        )
    pairs = zip(d.layers, kinds, strict=True)
    layers = tuple(replace(layer, dense=kind == "dense") for layer, kind in pairs)
    return replace(made, description=replace(d, layers=layers))


def further(made: Recipe, is_gguf: bool) -> Recipe:
    """Of the layer that predicts the token after next."""
    return behind(made, is_gguf)
