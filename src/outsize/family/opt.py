"""OPT (arXiv 2205.01068): LayerNorms, learned positions, biases everywhere, and feed-forwards of two matrices
with ReLU. Not OPT 350M, whose norms come after each half and whose embedding is narrower. llama.cpp has no
such architecture, so that there are no GGUF files of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family.common import describe
from outsize.family.config import Config
from outsize.family.recipe import Recipe
from outsize.model_config import Layer, Rope

DEFAULTS: dict[str, object] = {
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": None,
    "activation_function": "relu",
    "enable_bias": True,
    "tie_word_embeddings": True,
    "vocab_size": None,
}
FIXED: dict[str, tuple[object, ...]] = {
    "do_layer_norm_before": (True,),
    "_remove_final_layer_norm": (False,),
    "layer_norm_elementwise_affine": (True,),
}
EPS = 1e-5  # the config does not say
FIRST = 2  # row of the first position
NORMS = {"attn_norm": "self_attn_layer_norm", "ffn_norm": "final_layer_norm"}
MAPS = {
    **{n: f"self_attn.{n}_proj" for n in "qkv"},
    "o": "self_attn.out_proj",
    "up": "fc1",
    "down": "fc2",
}


def recipe(config: Config) -> Recipe:
    if config.format == "gguf":
        raise UnsupportedError(
            "opt in a GGUF: llama.cpp has no such architecture, and nobody's names are known; give the "
            "checkpoint in safetensors"
        )
    narrow = config.get("word_embed_proj_dim")
    if narrow not in (None, config.integer("hidden_size")):
        raise UnsupportedError(
            f"config: word_embed_proj_dim is {narrow!r}, hidden_size {config.integer('hidden_size'):,}; an "
            "embedding narrower than the model is not known"
        )
    base = describe(_usual(config))
    made = replace(
        base, two_matrix=True, layer_norm=True, positions=True,
        layers=(Layer(Rope(10_000.0, rotated=0)),) * base.num_layers,
    )  # fmt: skip
    return Recipe(made, _names(config), interleaved=True, unused_positions=FIRST)


def _usual(config: Config) -> Config:
    """Under the usual keys."""
    biased = config.flag("enable_bias")
    said = {
        "intermediate_size": config.get("ffn_dim"), "hidden_act": config.get("activation_function"),
        "attention_bias": biased, "mlp_bias": biased, "rms_norm_eps": EPS, "rope_theta": 10_000.0,
    }  # fmt: skip
    return replace(config, values={**config.values, **said})


def _names(config: Config) -> Mapping[str, str]:
    prefix = "decoder." if "decoder.embed_tokens.weight" in config.names else "model.decoder."
    layer = {n: f"{theirs}.weight" for n, theirs in (NORMS | MAPS).items()}
    layer |= {f"{n}_bias": f"{theirs}.bias" for n, theirs in (NORMS | MAPS).items()}
    return {
        "embed": f"{prefix}embed_tokens.weight",
        "positions": f"{prefix}embed_positions.weight",
        "final_norm": f"{prefix}final_layer_norm.weight",
        "final_norm_bias": f"{prefix}final_layer_norm.bias",
        "head": "lm_head.weight",
        **{n: f"{prefix}layers.{{i}}.{theirs}" for n, theirs in layer.items()},
    }
