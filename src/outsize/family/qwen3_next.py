"""Qwen3-Next (80B-A3B): three layers of the gated delta rule for each one of gated attention; experts."""

from __future__ import annotations

from dataclasses import replace

from outsize.family import delta
from outsize.family.config import Config
from outsize.family.further import apart
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **delta.DEFAULTS,
    **delta.MIXED,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_local_experts": 512,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
}
# Layers without experts are not known.
FIXED: dict[str, tuple[object, ...]] = {
    **delta.FIXED, "decoder_sparse_step": (1,), "mlp_only_layers": (None, []),
}  # fmt: skip
GGUF_READ = (*delta.GGUF_READ, "shared_expert_intermediate_size", "norm_topk_prob")
OWN = {
    "delta_inputs": "linear_attn.in_proj_qkvz.weight",
    "delta_ba": "linear_attn.in_proj_ba.weight",
}
# Files of 2025 have the inputs as one matrix.
WHOLE = "blk.{i}.ssm_in.weight"


def recipe(config: Config) -> Recipe:
    base, is_gguf = delta.described(config), config.format == "gguf"
    is_said = not is_gguf or config.get("norm_topk_prob") is not None  # files mostly leave it out
    mixed = delta.mixture(config, config.flag("norm_topk_prob") if is_said else True)
    made = replace(base, mixture=mixed, ffn_width=mixed.width)
    whole = not is_gguf or config.has(".ssm_in.weight")
    gguf = {"delta_ba": "blk.{i}.ssm_ba.weight", **({"delta_inputs": WHOLE} if whole else {})}
    strips = {**delta.strips(made, whole), **delta.gate_strips(made)}
    named, shift = delta.names(config, OWN, gguf), 0.0 if is_gguf else 1.0
    return Recipe(made, named, False, norm_shift=shift, spares=delta.SPARES, strips=strips)


def further(made: Recipe, is_gguf: bool) -> Recipe | None:
    """Of the layer that predicts the token after next, which GGUF files leave out."""
    return None if is_gguf else apart(made)
