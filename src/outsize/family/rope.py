"""Rotary positions as configs state them: plain, slowed for all pairs alike (linear), Llama 3's and YaRN.

Semantics are transformers' for Hugging Face configs (modeling_rope_utils.py) and llama.cpp's for GGUF
(llama-model.cpp, ggml_rope_yarn).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from outsize.errors import CheckpointError, UnsupportedError
from outsize.family.config import Config
from outsize.model_config import Rope

Table = Mapping[str, object]
KINDS = ("default", "linear", "llama3", "yarn")
KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
    "truncate", "partial_rotary_factor", "finetuned",
}  # fmt: skip
LAYER_TYPES = {"full_attention", "sliding_attention"}
ORIGINAL = "original_max_position_embeddings"
MOST = 1 << 24  # positions


def rope(config: Config, kind: str = "") -> Rope:
    """The rope of all layers, or of one kind of them where configs tell them apart (`kind`). Raises
    UnsupportedError, CheckpointError."""
    if config.format == "gguf":
        return _gguf(config)
    table = _table(config, kind)
    base = _positive(table, "rope_theta")
    if base <= 1:
        raise CheckpointError(f"config: rope_theta is {base}, more than 1 is expected")
    how = _kind(table)
    if how == "default":
        return Rope(base)
    if how == "yarn":
        return yarn(table, base, config.head_dim)
    return Rope(base, rope_divisors(table, base, config.head_dim))


def context(config: Config, kind: str = "") -> int:
    """Positions that the model is made for: under YaRN at least the original ones times the factor,
    whatever else the config says, as in vLLM."""
    stated = config.integer("max_position_embeddings")
    if config.format == "gguf":
        key = "rope.scaling.original_context_length"
        if config.get("rope.scaling.type") != "yarn" or config.get(key) is None:
            return stated
        made = _gguf_factor(config) * config.integer(key)
    else:
        table = _table(config, kind)
        if _kind(table) != "yarn":
            return stated
        made = _positive(table, "factor") * _positive(table, ORIGINAL)
    return max(stated, int(min(made, MOST)))


def _table(config: Config, kind: str) -> dict[str, object]:
    """What the config says of scaling, with what transformers adds: `rope_scaling` goes before
    `rope_parameters`, a key of its own before the table's, the context for a missing original one."""
    own, old = config.table("rope_parameters"), config.table("rope_scaling")
    found = dict(old or own)
    if kind:
        _known(own, LAYER_TYPES, "rope_parameters")
        inner = own.get(kind) or {}
        if not isinstance(inner, dict):
            raise CheckpointError(f"config: rope_parameters {kind} is {inner!r}, an object is due")
        found = inner | (old if kind == "full_attention" else {})
    _kind(found)
    _known(found, KEYS, "rope_scaling" if old else "rope_parameters")
    if found.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedError(
            f"config: partial_rotary_factor is {found['partial_rotary_factor']!r}; heads that rotate "
            "whole (1.0) are known"
        )
    original = config.get(ORIGINAL) or found.get(ORIGINAL) or config.get("max_position_embeddings")
    base = found.get("rope_theta") or config.number("rope_theta", 10_000.0)
    return found | {ORIGINAL: original, "rope_theta": base}


def _known(table: Table, keys: set[str], name: str) -> None:
    strange = sorted(k for k, v in table.items() if k not in keys and v is not None)
    if strange:
        raise UnsupportedError(
            f"config: {name} has the key {strange[0]!r}, which is not known; known are "
            f"{', '.join(sorted(keys))}"
        )


def _kind(table: Table) -> str:
    kind = table.get("rope_type") or table.get("type") or "default"
    if kind not in KINDS:
        raise UnsupportedError(
            f"config: rope_type {kind!r} is not known; known are {', '.join(KINDS)}"
        )
    return str(kind)


def rope_divisors(table: Table, base: float, head_dim: int) -> tuple[float, ...]:
    """Divisors of a linear or a Llama 3 table. Raises CheckpointError."""
    factor = _positive(table, "factor")
    if _kind(table) == "linear":
        return (factor,) * (head_dim // 2)
    return _llama3_divisors(table, factor, base, head_dim)


def yarn(table: Table, base: float, head_dim: int) -> Rope:
    """YaRN (arXiv 2309.00071): fast pairs are kept, slow ones slowed by `factor`, those between blended;
    all made longer by a tenth of the factor's logarithm."""
    factor, original = _positive(table, "factor"), _positive(table, ORIGINAL)
    turns = {"beta_fast": 32.0, "beta_slow": 1.0} | {k: v for k, v in table.items() if v}

    def pair(key: str) -> float:
        count = _positive(turns, key)
        return head_dim * math.log(original / (count * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair("beta_fast"), pair("beta_slow")
    if table.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    divisors = []
    for i in range(head_dim // 2):
        slowed = min(1.0, max(0.0, (i - low) / max(high - low, 1e-3)))
        divisors.append(1 / (slowed / factor + 1 - slowed))
    return Rope(base, tuple(divisors), _length(table, factor))


def _length(table: Table, factor: float) -> float:
    """How much longer YaRN makes queries and keys."""
    if table.get("attention_factor") is not None:
        return _positive(table, "attention_factor")

    def longer(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0

    if table.get("mscale") and table.get("mscale_all_dim"):
        return longer(_positive(table, "mscale")) / longer(_positive(table, "mscale_all_dim"))
    return longer(1.0)


def _positive(table: Table, key: str) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise CheckpointError(f"config: rope scaling {key} is {value!r}, a positive number is due")
    return float(value)


def _llama3_divisors(table: Table, factor: float, base: float, head_dim: int) -> tuple[float, ...]:
    """Llama 3: slow pairs are slowed by `factor`, fast ones kept, those between blended."""
    low, high = _positive(table, "low_freq_factor"), _positive(table, "high_freq_factor")
    original = _positive(table, ORIGINAL)
    if high <= low:
        raise CheckpointError(f"config: rope high_freq_factor {high} is not above low {low}")
    out = []
    for i in range(head_dim // 2):
        turns = original * base ** (-2 * i / head_dim) / (2 * math.pi)  # over the old context
        blend = min(1.0, max(0.0, (turns - low) / (high - low)))
        out.append(1 / ((1 - blend) / factor + blend))
    return tuple(out)


def _gguf_factor(config: Config) -> float:
    """Files of 2023 say `rope.scale_linear`; 0 means none."""
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        if config.get(key) not in (None, 0):
            return config.number(key)
    return 1.0


def _gguf(config: Config) -> Rope:
    """Linear where a file names no kind; a factor times the divisors of a tensor, where both are there."""
    base, kind = config.number("rope_theta", 10_000.0), config.get("rope.scaling.type") or "linear"
    if kind not in ("none", "linear", "yarn") or (kind == "yarn" and config.divisors):
        also = " beside rope_freqs.weight" if config.divisors else ""
        raise UnsupportedError(
            f"config: {config.key('rope.scaling.type')} {kind!r}{also} is not known; known are none, "
            "linear, yarn"
        )
    scale = config.number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        return _gguf_yarn(config, base, scale)
    factor, half = 1.0 if kind == "none" else _gguf_factor(config), config.head_dim // 2
    divisors = config.divisors or ((1.0,) * half if factor != 1.0 else ())
    if len(divisors) not in (0, half):
        raise CheckpointError(f"rope_freqs.weight has {len(divisors):,} numbers, {half} are due")
    return Rope(base, tuple(factor * divisor for divisor in divisors), scale)


def _gguf_yarn(config: Config, base: float, scale: float) -> Rope:
    factor = _gguf_factor(config)
    original = config.number(
        "rope.scaling.original_context_length", config.number("max_position_embeddings")
    )
    table = {
        "factor": factor,
        ORIGINAL: original,
        "beta_fast": config.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": config.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    scale *= config.number("rope.scaling.yarn_attn_factor", 1.0)
    return yarn(table | {"attention_factor": scale * _length({}, factor)}, base, config.head_dim)
