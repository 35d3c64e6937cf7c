"""Layers that predict the token after next, of the model's own states (multi-token prediction, DeepSeek V3,
arXiv 2412.19437): what they are, as a model of one layer, and what checkpoints call their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from outsize.family.recipe import Recipe
from outsize.model_config import Layer

EVERYTHING = (r".*",)  # of the checkpoint's tensors, it is not to use them all
BEHIND = {  # as layers behind the last one
    "token_norm": "model.layers.{i}.enorm.weight",
    "state_norm": "model.layers.{i}.hnorm.weight",
    "join": "model.layers.{i}.eh_proj.weight",
    "final_norm": "model.layers.{i}.shared_head.norm.weight",
}
GGUF = {
    "token_norm": "blk.{i}.nextn.enorm.weight",
    "state_norm": "blk.{i}.nextn.hnorm.weight",
    "join": "blk.{i}.nextn.eh_proj.weight",
    "final_norm": "blk.{i}.nextn.shared_head_norm.weight",
}
APART = {  # beside the model
    "token_norm": "mtp.pre_fc_norm_embedding.weight",
    "state_norm": "mtp.pre_fc_norm_hidden.weight",
    "join": "mtp.fc.weight",
    "final_norm": "mtp.norm.weight",
}


def behind(made: Recipe, is_gguf: bool) -> Recipe:
    """Of the layer behind a model's last one, which is of the last one's kind."""
    number, own = str(made.description.num_layers), GGUF if is_gguf else BEHIND
    names = {k: v.replace("{i}", number) for k, v in {**made.names, **own}.items()}
    return _recipe(made, made.description.layers[-1], names)


def apart(made: Recipe) -> Recipe:
    """Of a layer of attention beside the model."""
    found = [layer for layer in made.description.layers if layer.mixer == "attention"]
    names = {}
    for ours, theirs in {**made.names, **APART}.items():
        _, layer, rest = theirs.partition("layers.{i}.")
        names[ours] = f"mtp.layers.0.{rest}" if layer else theirs
    return _recipe(made, found[-1], names)


def _recipe(made: Recipe, layer: Layer, names: Mapping[str, str]) -> Recipe:
    d = replace(made.description, layers=(layer,), further=True, delta=None, kernel=0)
    return replace(made, description=d, names=names, spares=EVERYTHING)
