"""Find the family of a checkpoint, and its recipe: what the model is, and what the file calls its tensors.

A family is a file of this folder, named as `model_type` in config.json (or `general.architecture` in a GGUF);
`qwen3.py` is the smallest.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import outsize.family as package
from outsize import registry
from outsize.checkpoint.checkpoint import Checkpoint, read_floats
from outsize.errors import CheckpointError, UnsupportedError
from outsize.family.bounds import fault
from outsize.family.config import Config
from outsize.family.keys import check, check_gguf
from outsize.family.recipe import Recipe

ALIASES = {
    "gemma3_text": "gemma3", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "qwen2moe": "qwen2_moe",
    "minimax-m2": "minimax_m2", "glm4moe": "glm4_moe", "deepseek2": "deepseek_v3",
    "mistral3": "ministral3", "llama4_text": "llama4", "qwen3next": "qwen3_next", "qwen35": "qwen3_5",
    "qwen35moe": "qwen3_5_moe", "qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe",
    "gemma4_text": "gemma4", "gemma3n_text": "gemma3n", "nemotron_h_moe": "nemotron_h",
}  # fmt: skip
# Families that were looked at, and what they would need.
MISSING = {
    "gemma3n": "its four residual streams, and maps of low rank beside attention, are not built; Gemma 4 is",
    "nemotron_h": "its layers have one half alone, many of them Mamba 2, which is not built; Qwen3-Next and "
    "LFM2 are",
}
NOT_FAMILIES = (
    "bounds",
    "bounds_forms",
    "common",
    "config",
    "convolutions",
    "delta",
    "find",
    "further",
    "gemma4_parts",
    "keys",
    "latent",
    "recipe",
    "rope",
    "sharing",
    "yarn",
)
OWN = {  # of families that call their embedding otherwise
    "opt": "model.decoder.embed_tokens.weight",
    "falcon": "transformer.word_embeddings.weight",
}
EMBEDDINGS = (
    "token_embd.weight",
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    *OWN.values(),
)


def families() -> list[str]:
    """The architectures we run."""
    return [name for name in registry.names(package) if name not in NOT_FAMILIES]


def recipe(checkpoint: Checkpoint) -> Recipe:
    """What the checkpoint is and where it keeps it. Raises UnsupportedError, CheckpointError."""
    name = _named(checkpoint)
    family = _family(checkpoint, name)
    config = _config(checkpoint, name, family.DEFAULTS)
    if checkpoint.format == "gguf":
        check_gguf(config, getattr(family, "GGUF_READ", ()))
    else:
        fixed = getattr(family, "FIXED", {})  # most have none
        check(name, _stated(checkpoint.config), family.DEFAULTS, fixed)
    made: Recipe = family.recipe(config)
    if problem := fault(made.description):
        raise CheckpointError(f"config: {problem}; the file is damaged: fetch it again")
    return made


def further_recipe(checkpoint: Checkpoint) -> Recipe:
    """Of its layer that predicts the token after next, as a model of its own. Raises UnsupportedError."""
    made = recipe(checkpoint)
    name = _named(checkpoint)
    family = _family(checkpoint, name)
    find = getattr(family, "further", None)
    found: Recipe | None = find(made, checkpoint.format == "gguf") if find is not None else None
    if found is None or found.names["join"] not in checkpoint.tensors:
        kind = "GGUF files" if checkpoint.format == "gguf" else "checkpoints"
        raise UnsupportedError(
            f"draft=native: this {name} model has no layer that predicts further tokens, or outsize does not "
            f"know it in {kind} of that family; use draft=ngram, or draft=auto"
        )
    return found


def _family(checkpoint: Checkpoint, name: str) -> ModuleType:
    """Raises UnsupportedError, saying which file names it, and what is known to be missing."""
    file = checkpoint.files[0].name if checkpoint.format == "gguf" else "config.json"
    if name in MISSING:
        raise UnsupportedError(f"{file}: the architecture {name!r} is not known: {MISSING[name]}")
    return registry.module(package, name, f"{file}: the architecture", families())


def _named(checkpoint: Checkpoint) -> str:
    """The family's name. Mistral 3's folders are of two, as the text model's part says."""
    name, inner = checkpoint.architecture, checkpoint.config.get("text_config")
    if checkpoint.format != "gguf" and name == "mistral3" and isinstance(inner, dict):
        name = str(inner.get("model_type", "mistral"))
    return ALIASES.get(name, name)


def _stated(values: Mapping[str, object]) -> Mapping[str, object]:
    """The text model's part of a config, each key under one name."""
    inner = values.get("text_config")
    out = dict(values)
    if isinstance(inner, dict):  # whether the head is tied, the whole model's part says
        out = inner | {"tie_word_embeddings": values.get("tie_word_embeddings", True)}
    for name in ("num_experts", "n_routed_experts"):
        if out.get(name) is None:
            continue
        count = out.pop(name)
        if out.setdefault("num_local_experts", count) != count:
            raise CheckpointError(
                f"config: {name} is {count!r}, num_local_experts {out['num_local_experts']!r}; "
                "they are two names of one number"
            )
    return out


def _config(checkpoint: Checkpoint, name: str, defaults: Mapping[str, object]) -> Config:
    is_gguf = checkpoint.format == "gguf"
    embedding = [checkpoint.tensors[n] for n in EMBEDDINGS if n in checkpoint.tensors]
    if not embedding or len(embedding[0].shape) != 2:
        due = EMBEDDINGS[0] if is_gguf else OWN.get(name, EMBEDDINGS[1])
        raise CheckpointError(
            f"no token embedding ({due}) among {len(checkpoint.tensors)} tensors; "
            "the checkpoint is not one of a language model, or not complete"
        )
    return Config(
        format=checkpoint.format,
        architecture=checkpoint.architecture if is_gguf else name,
        values=checkpoint.config if is_gguf else {**defaults, **_stated(checkpoint.config)},
        names=frozenset(checkpoint.tensors),
        vocab_size=embedding[0].shape[0],
        divisors=_divisors(checkpoint, "rope_freqs.weight", "rope_factors_short.weight"),
        long_divisors=_divisors(checkpoint, "rope_factors_long.weight"),
    )


def _divisors(checkpoint: Checkpoint, *names: str) -> tuple[float, ...]:
    tensor = next((checkpoint.tensors[n] for n in names if n in checkpoint.tensors), None)
    if tensor is None or tensor.size > 1 << 16:
        return ()
    return tuple(float(v) for v in read_floats(tensor).ravel())
