"""What LFM2's configs say in words of their own: widths, and which layers are of a short convolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family.config import Config

KINDS = {"conv": "conv", "full_attention": "attention"}


def usual(config: Config) -> tuple[Config, list[str]]:
    """The config under the usual keys, and each layer's mixer. A GGUF tells layers by their key heads, which
    those of a convolution have none of."""
    count = config.integer("num_hidden_layers")
    if config.format == "gguf":
        heads = config.get("num_key_value_heads")
        each = heads if isinstance(heads, list) else [heads] * count
        numbers = [n for n in each if isinstance(n, int) and not isinstance(n, bool)]
        most = max(numbers, default=0)
        if len(numbers) != count or len(each) != count or {*numbers} - {0, most}:
            raise UnsupportedError(
                f"config: {config.key('num_key_value_heads')} is {str(heads)[:80]}; 0 or one number is known "
                f"for each of {count} layers"
            )
        kinds = ["attention" if n else "conv" for n in numbers]
        own: dict[str, object] = {"num_key_value_heads": most}
    else:
        kinds = _kinds(config, count)
        own = {"rms_norm_eps": config.get("norm_eps"), "hidden_act": "silu"}
        own["intermediate_size"] = _inner(config)
        if config.get("tie_embedding") is not None:
            own["tie_word_embeddings"] = config.flag("tie_embedding")
    values: Mapping[str, object] = {config.key(k): v for k, v in own.items()}
    return replace(config, values={**config.values, **values}), kinds


def _inner(config: Config) -> int:
    """The feed-forward's width: two thirds of what is stated, times a factor, rounded up; or as stated."""
    inner = config.integer("intermediate_size", 1)
    if config.get("block_ff_dim") is not None:
        inner = config.integer("block_ff_dim")
    if not config.flag("block_auto_adjust_ff_dim"):
        return inner
    inner = int(2 * inner / 3)
    if config.get("block_ffn_dim_multiplier") is None:
        return inner
    unit = config.integer("block_multiple_of")
    return -(-int(config.number("block_ffn_dim_multiplier") * inner) // unit) * unit


def _kinds(config: Config, count: int) -> list[str]:
    said, places = config.get("layer_types"), config.get("full_attn_idxs")
    if said is None and (places is None or isinstance(places, list)):
        chosen = range(count) if places is None else places
        said = ["full_attention" if i in chosen else "conv" for i in range(count)]
    if not isinstance(said, list) or len(said) != count or any(k not in tuple(KINDS) for k in said):
        raise UnsupportedError(
            f"config: layer_types must list conv or full_attention for each of {count} layers"
        )
    return [KINDS[k] for k in said]
