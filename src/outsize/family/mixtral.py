"""Mixtral: Mistral with 8 large experts, 2 used. Its GGUF files say "llama"."""

from __future__ import annotations

from dataclasses import replace

from outsize.family import mistral
from outsize.family.common import MIXTRAL, mixture, names, with_names
from outsize.family.config import Config
from outsize.family.recipe import Recipe

DEFAULTS: dict[str, object] = {
    **mistral.DEFAULTS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
HF_LAYER = with_names(MIXTRAL)


def recipe(config: Config) -> Recipe:
    base = mistral.recipe(config)
    mixed = mixture(config, renorm=True)
    made = replace(base.description, mixture=mixed, ffn_width=mixed.width)
    return replace(base, description=made, names=names(config, HF_LAYER))
