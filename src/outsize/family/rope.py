"""Rotary positions as configs state them: plain, slowed for all pairs alike (linear), Llama 3's, YaRN,
LongRoPE (two sets of divisors, one of which a run takes by its context) and dynamic (a base that grows).

Semantics are transformers' for Hugging Face configs (modeling_rope_utils.py) and llama.cpp's for GGUF
(llama-model.cpp, ggml_rope_yarn).
"""

from __future__ import annotations

import math
from dataclasses import replace

from outsize.errors import CheckpointError, UnsupportedError
from outsize.family.config import Config
from outsize.family.yarn import ORIGINAL, Table, longer_by, positive, yarn
from outsize.model_config import Rope

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")
KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
    "truncate", "partial_rotary_factor", "finetuned", "short_factor", "long_factor", "mrope_section",
    "mrope_interleaved",
}  # fmt: skip
# In texts, the three positions of a token that multimodal ropes (mrope) take are one: sections say nothing.
TEMPERED = "llama_4_scaling_beta"
PARTIAL = "partial_rotary_factor"
LAYER_TYPES = {"full_attention", "sliding_attention"}
MOST = 1 << 24  # positions


def rope(config: Config, kind: str = "") -> Rope:
    """The rope of all layers, or of one kind of them where configs tell them apart (`kind`). Raises
    UnsupportedError, CheckpointError."""
    if config.format == "gguf":
        return _gguf(config)
    table = _table(config, kind)
    base = positive(table, "rope_theta")
    if base <= 1:
        raise CheckpointError(f"config: rope_theta is {base}, more than 1 is expected")
    rotated = rotated_of(config, table)
    made = _scaled(config, table, base, rotated)
    made = made if rotated == config.head_dim else replace(made, rotated=rotated)
    if table.get(TEMPERED):
        growth = positive(table, TEMPERED)
        made = replace(made, query_growth=growth, original=int(positive(table, ORIGINAL)))
    return made


def rotated_of(config: Config, table: Table) -> int:
    """How many numbers of a head rotate: so many, or a part of them. Raises CheckpointError."""
    head_dim, part = config.head_dim, table.get(PARTIAL)
    if config.get("rotary_dim") is not None:
        found = config.integer("rotary_dim")
    elif part is None:
        return head_dim
    else:
        found = int(head_dim * min(positive(table, PARTIAL), 1e6))
    if found % 2 or not 0 < found <= head_dim:
        raise CheckpointError(
            f"config: {found} numbers of heads of {head_dim} rotate ({PARTIAL} {part!r}); an even number of "
            "them is due"
        )
    return found


def _scaled(config: Config, table: Table, base: float, dim: int) -> Rope:
    how = _kind(table)
    if how == "default":
        return Rope(base)
    if how == "yarn":
        return yarn(table, base, dim)
    if how == "longrope":
        return _long(config, table, base, dim // 2)
    if how == "dynamic":
        growth, original = positive(table, "factor"), config.integer("max_position_embeddings")
        if dim < 4:
            raise CheckpointError(f"config: a dynamic rope of {dim} numbers; 4 or more are due")
        return Rope(base, original=original, growth=growth)
    return Rope(base, rope_divisors(table, base, dim))


def _long(config: Config, table: Table, base: float, pairs: int) -> Rope:
    """LongRoPE (arXiv 2402.13753)."""
    short, far = (_numbers(table, key, pairs) for key in ("short_factor", "long_factor"))
    original = positive(table, ORIGINAL)
    factor = config.integer("max_position_embeddings") / original
    if table.get("factor") is not None:
        factor = positive(table, "factor")
    longer = factor > 1 and original > 1
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if longer else 1.0
    if table.get("attention_factor") is not None:
        scale = positive(table, "attention_factor")
    return Rope(base, short, scale, original=int(original), long_divisors=far)


def _numbers(table: Table, key: str, count: int) -> tuple[float, ...]:
    found = table.get(key)
    if not isinstance(found, list) or len(found) != count:
        size = f"{len(found):,} numbers" if isinstance(found, list) else repr(found)[:80]
        raise CheckpointError(f"config: rope scaling {key} is {size}, {count} numbers are due")
    return tuple(positive({key: value}, key) for value in found)


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
        if _kind(table) not in ("yarn", "dynamic"):
            return stated
        known = positive(table, ORIGINAL) if _kind(table) == "yarn" else stated
        made = positive(table, "factor") * known
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
    more = {TEMPERED, "max_position_embeddings"} if TEMPERED in config.values else set()
    _known(found, KEYS | more, "rope_scaling" if old else "rope_parameters")
    if PARTIAL not in config.values and found.get(PARTIAL) not in (None, 1, 1.0):
        raise UnsupportedError(
            f"config: {PARTIAL} is {found[PARTIAL]!r}; heads that rotate whole (1.0) are known"
        )
    found = {PARTIAL: config.get(PARTIAL), TEMPERED: config.get(TEMPERED)} | found
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
    kind = "default" if kind == "mrope" else kind
    if kind not in KINDS:
        raise UnsupportedError(
            f"config: rope_type {kind!r} is not known; known are {', '.join(KINDS)}"
        )
    return str(kind)


def rope_divisors(table: Table, base: float, head_dim: int) -> tuple[float, ...]:
    """Divisors of a linear or a Llama 3 table. Raises CheckpointError."""
    factor = positive(table, "factor")
    if _kind(table) == "linear":
        return (factor,) * (head_dim // 2)
    return _llama3_divisors(table, factor, base, head_dim)


def _llama3_divisors(table: Table, factor: float, base: float, head_dim: int) -> tuple[float, ...]:
    """Llama 3: slow pairs are slowed by `factor`, fast ones kept, those between blended."""
    low, high = positive(table, "low_freq_factor"), positive(table, "high_freq_factor")
    original = positive(table, ORIGINAL)
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
    known = ("none", "linear", "yarn", *(("longrope",) if config.long_divisors else ()))
    if kind not in known or (kind == "yarn" and config.divisors):
        also = " beside rope_freqs.weight" if config.divisors else ""
        raise UnsupportedError(
            f"config: {config.key('rope.scaling.type')} {kind!r}{also} is not known; known are none, "
            "linear, yarn"
        )
    scale = config.number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        return _gguf_yarn(config, base, scale)
    rotated = gguf_rotated(config)
    factor, half = _gguf_factor(config) if kind == "linear" else 1.0, rotated // 2
    divisors = config.divisors or ((1.0,) * half if factor != 1.0 else ())
    if {len(divisors), len(config.long_divisors)} - {0, half}:
        size = max(len(divisors), len(config.long_divisors))
        raise CheckpointError(f"the tensor of rope divisors has {size:,} numbers, {half} are due")
    made = Rope(base, tuple(factor * divisor for divisor in divisors), scale)
    if config.long_divisors:
        original = config.integer(
            "rope.scaling.original_context_length", config.integer("max_position_embeddings")
        )
        made = replace(made, original=original, long_divisors=config.long_divisors)
    return made if rotated == config.head_dim else replace(made, rotated=rotated)


def gguf_rotated(config: Config) -> int:
    """How many numbers of a head rotate. (A family whose heads rotate whole refuses others before.)"""
    found = config.integer("rotary_dim", config.head_dim)
    if found % 2 or found > config.head_dim:
        raise CheckpointError(
            f"config: {config.key('rotary_dim')} is {found} of heads of {config.head_dim} numbers; an even "
            "number of them is due"
        )
    return found


def _gguf_yarn(config: Config, base: float, scale: float) -> Rope:
    factor = _gguf_factor(config)
    original = config.number(
        "rope.scaling.original_context_length", config.number("max_position_embeddings")
    )
    table: dict[str, object] = {
        "factor": factor,
        ORIGINAL: original,
        "beta_fast": config.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": config.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    scale *= config.number("rope.scaling.yarn_attn_factor", 1.0)
    rotated = gguf_rotated(config)
    if config.get("yarn_log_multiplier") is not None:
        table |= {"mscale": 1.0, "mscale_all_dim": config.number("yarn_log_multiplier")}
    made = yarn(table | {"attention_factor": scale * longer_by(table, factor)}, base, rotated)
    return made if rotated == config.head_dim else replace(made, rotated=rotated)
