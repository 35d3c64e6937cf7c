"""Qwen3.5 (dense), its text part: Qwen3-Next without experts, with the inputs of the delta rule apart."""

from __future__ import annotations

from dataclasses import replace

from outsize.family import delta
from outsize.family.config import Config
from outsize.family.further import apart
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **delta.DEFAULTS,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
# Published configs say these; layers without experts are not known beside such with them.
FIXED: dict[str, tuple[object, ...]] = {**delta.FIXED, "mlp_only_layers": (None, [])}
GGUF_READ = delta.GGUF_READ
OWN = {
    "delta_qkv": "linear_attn.in_proj_qkv.weight",
    "delta_z": "linear_attn.in_proj_z.weight",
    "delta_b": "linear_attn.in_proj_b.weight",
    "delta_a": "linear_attn.in_proj_a.weight",
}
GGUF = {"delta_b": "blk.{i}.ssm_beta.weight", "delta_a": "blk.{i}.ssm_alpha.weight"}


def recipe(config: Config) -> Recipe:
    """In a GGUF, value heads are in the order in which ggml repeats key heads."""
    base, is_gguf = delta.described(config), config.format == "gguf"
    assert base.delta is not None
    made = replace(base, delta=replace(base.delta, is_tiled=is_gguf))
    named, shift = delta.names(config, OWN, GGUF), 0.0 if is_gguf else 1.0
    strips = delta.strips(made, whole=False)
    return Recipe(made, named, False, norm_shift=shift, spares=delta.SPARES, strips=strips)


def further(made: Recipe, is_gguf: bool) -> Recipe | None:
    """Of the layer that predicts the token after next, which GGUF files leave out."""
    return None if is_gguf else apart(made)
