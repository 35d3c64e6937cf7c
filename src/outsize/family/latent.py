"""What families with latent attention share: their sizes, their tensors' names, their scale."""

from __future__ import annotations

import math
from dataclasses import replace

from outsize.errors import UnsupportedError
from outsize.family.common import describe
from outsize.family.config import Config
from outsize.model_config import Description
from outsize.model_parts import Latent

GGUF_READ = (
    "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "norm_topk_prob",
    "routed_scaling_factor", "num_nextn_predict_layers", "scoring_func", "rotary_dim", "kv_lora_rank",
    "q_lora_rank", "qk_head_dim", "v_head_dim", "value_length", "yarn_log_multiplier",
)  # fmt: skip
HF = {
    "q_a": "self_attn.q_a_proj.weight",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
}
GGUF = {
    "q_a": "blk.{i}.attn_q_a.weight",
    "q_a_norm": "blk.{i}.attn_q_a_norm.weight",
    "kv_a": "blk.{i}.attn_kv_a_mqa.weight",
    "kv_a_norm": "blk.{i}.attn_kv_a_norm.weight",
    "k_b": "blk.{i}.attn_k_b.weight",
    "v_b": "blk.{i}.attn_v_b.weight",
}
# A GGUF has a tenth of what the config says, which other families' files have in full.
LOG_PART = 0.1


def described(config: Config) -> Description:
    """A decoder with latent attention, whose one key head is what the cache keeps."""
    sizes = _sizes(config)
    base = describe(_one_head(config, sizes))
    return replace(base, latent=sizes, attn_scale=_scale(config, sizes))


def query_names(config: Config, sizes: Latent) -> tuple[dict[str, str], dict[str, str]]:
    """Our names -> a safetensors layer's, and a GGUF's: queries' last map is of their own rank or not."""
    q, blk = ("q_b", "attn_q_b") if sizes.query_rank else ("q", "attn_q")
    hf = {**HF, "q_b": f"self_attn.{q}_proj.weight"}
    return hf, {**GGUF, "q_b": f"blk.{{i}}.{blk}.weight"}


def _sizes(config: Config) -> Latent:
    is_gguf, rank = config.format == "gguf", config.integer("kv_lora_rank")
    if is_gguf and config.get("qk_head_dim") is None:
        raise UnsupportedError(
            f"config: {config.key('qk_head_dim')} is missing: the GGUF was made before April 2025, with "
            "keys' and values' maps as one; take one that is newer"
        )
    rope = config.integer("rotary_dim" if is_gguf else "qk_rope_head_dim")
    key = config.integer("qk_head_dim") - rope if is_gguf else config.integer("qk_nope_head_dim")
    return Latent(rank, rope, key, config.integer("v_head_dim"), config.count("q_lora_rank"))


def _one_head(config: Config, sizes: Latent) -> Config:
    """The config of what is attended to: one key head of rotated and latent numbers."""
    heads, size = config.integer("num_attention_heads"), sizes.rank + sizes.rope
    kv_heads = 1 if config.format == "gguf" else heads
    for key, due in (("num_key_value_heads", kv_heads), ("value_length", sizes.rank)):
        if config.get(key) not in (None, due):
            raise UnsupportedError(
                f"config: {config.key(key)} is {config.get(key)!r} beside latent attention; {due} is known"
            )
    own: dict[str, object] = {"num_key_value_heads": 1, "head_dim": size, "rotary_dim": sizes.rope}
    if config.format == "gguf" and config.get("yarn_log_multiplier") is not None:
        own["yarn_log_multiplier"] = config.number("yarn_log_multiplier") / LOG_PART
    values = {config.key(key): value for key, value in own.items()}
    return replace(config, values={**config.values, **values})


def _scale(config: Config, sizes: Latent) -> float:
    """1 / sqrt of a whole key's numbers; under YaRN with a factor of its own, squared."""
    scale = 1 / math.sqrt(sizes.key + sizes.rope)
    if config.format == "gguf":
        is_yarn = config.get("rope.scaling.type") == "yarn"
        times = config.number("yarn_log_multiplier", 0.0) / LOG_PART if is_yarn else 0.0
        factor = config.number("rope.scaling.factor", 1.0) if is_yarn else 1.0
    else:
        table = config.table("rope_parameters") or config.table("rope_scaling")
        if table.get("rope_type", table.get("type", "default")) == "default":
            return scale
        times, factor = (_number(table.get(k)) for k in ("mscale_all_dim", "factor"))
    longer = 0.1 * times * math.log(factor) + 1.0 if times and factor > 1 else 1.0
    return scale * longer * longer


def _number(value: object) -> float:
    """Of a table that `rope` has checked."""
    return float(value) if isinstance(value, int | float) else 0.0
