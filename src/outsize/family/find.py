"""A checkpoint -> its family's recipe."""

from __future__ import annotations

from collections.abc import Mapping

import outsize.family as package
from outsize import resolve
from outsize.checkpoint.foreign import Checkpoint, read_floats
from outsize.errors import CheckpointError
from outsize.family.description import Config, Recipe

ALIASES = {"gemma3_text": "gemma3", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss"}
NOT_FAMILIES = ("common", "description", "find")
EMBEDDINGS = (
    "token_embd.weight",
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
)


def families() -> list[str]:
    """The architectures we run."""
    return [name for name in resolve.names(package) if name not in NOT_FAMILIES]


def recipe(checkpoint: Checkpoint) -> Recipe:
    """What the checkpoint is and where it keeps it. Raises UnsupportedError, CheckpointError."""
    name = ALIASES.get(checkpoint.architecture, checkpoint.architecture)
    family = resolve.module(package, name, "architecture", families())
    made: Recipe = family.recipe(_config(checkpoint, name))
    return made


def _config(checkpoint: Checkpoint, name: str) -> Config:
    values: Mapping[str, object] = checkpoint.config
    inner = values.get("text_config")
    embedding = [checkpoint.tensors[n] for n in EMBEDDINGS if n in checkpoint.tensors]
    if not embedding or len(embedding[0].shape) != 2:
        raise CheckpointError(f"no token embedding among {len(checkpoint.tensors)} tensors")
    return Config(
        format=checkpoint.format,
        architecture=checkpoint.architecture if checkpoint.format == "gguf" else name,
        values=inner if isinstance(inner, dict) else values,
        names=frozenset(checkpoint.tensors),
        vocab_size=embedding[0].shape[0],
        divisors=_divisors(checkpoint),
    )


def _divisors(checkpoint: Checkpoint) -> tuple[float, ...]:
    tensor = checkpoint.tensors.get("rope_freqs.weight")
    if tensor is None or tensor.size > 1 << 16:
        return ()
    return tuple(float(v) for v in read_floats(tensor).ravel())
