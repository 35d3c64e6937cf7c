"""A checkpoint's config under one set of names, whichever format it came from: Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from outsize.errors import CheckpointError, UnsupportedError

GGUF_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
# Those that few families have, each of which names its own (`GGUF_READ`).
FEW_KEYS = {
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "scoring_func": "expert_gating_func",
    "first_k_dense_replace": "leading_dense_block_count",
    "num_nextn_predict_layers": "nextn_predict_layers",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
    "kv_lora_rank": "attention.kv_lora_rank",
    "q_lora_rank": "attention.q_lora_rank",
    "qk_head_dim": "attention.key_length_mla",
    "v_head_dim": "attention.value_length_mla",
    "value_length": "attention.value_length",
    "rotary_dim": "rope.dimension_count",
    "yarn_log_multiplier": "rope.scaling.yarn_log_multiplier",
    "temperature_scale": "attention.temperature_scale",
    "temperature_length": "attention.temperature_length",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logits_scaling": "logit_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "linear_values": "ssm.inner_size",
    "conv_L_cache": "shortconv.l_cache",
    "full_attention_interval": "full_attention_interval",
    "swa_head_dim": "attention.key_length_swa",
    "swa_value_length": "attention.value_length_swa",
    "swa_rotary_dim": "rope.dimension_count_swa",
    "num_kv_shared_layers": "attention.shared_kv_layers",
    "hidden_size_per_layer_input": "embedding_length_per_layer_input",
}
LIMITS = {"num_hidden_layers": 4096, "num_attention_heads": 4096, "num_key_value_heads": 4096}
MOST_HEAD = 4096


def plain(value: object) -> object:
    """A GGUF's arrays as lists."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [plain(v) for v in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Config:
    """`values` holds what a Hugging Face config leaves out, too: the family's class defaults."""

    format: str
    architecture: str
    values: Mapping[str, object]
    names: frozenset[str]  # of the checkpoint's tensors
    vocab_size: int
    divisors: tuple[float, ...] = field(default=())  # rope divisors stored as a tensor (GGUF)
    long_divisors: tuple[float, ...] = field(default=())  # the same for a long context (LongRoPE)

    def key(self, key: str) -> str:
        """The key under which this format keeps it."""
        if self.format != "gguf":
            return key
        return f"{self.architecture}.{GGUF_KEYS.get(key) or FEW_KEYS.get(key, key)}"

    def get(self, key: str) -> object:
        """A GGUF's list of one number for every layer is that number."""
        value = plain(self.values.get(self.key(key)))
        if self.format == "gguf" and isinstance(value, list) and value:
            return value[0] if value.count(value[0]) == len(value) else value
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, list):
            raise UnsupportedError(
                f"config: {self.key(key)} differs from layer to layer; one value for all is known"
            )
        limit = LIMITS.get(key, 1 << 24)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            raise CheckpointError(
                f"config: {self.key(key)} is {value!r}, a whole number from 1 to {limit:,} is expected"
            )
        return value

    def count(self, key: str, default: int = 0) -> int:
        """A whole number that may be 0; `default` if it is left out."""
        value = self.get(key)
        if value is None:
            return default
        return 0 if value == 0 and not isinstance(value, bool) else self.integer(key)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise CheckpointError(
                f"config: {self.key(key)} is {value!r}, a positive number is expected"
            )
        return float(value)

    def flag(self, key: str) -> bool:
        """False if it is left out."""
        value = self.get(key)
        if value not in (None, False, True):
            raise CheckpointError(
                f"config: {self.key(key)} is {value!r}, true or false is expected"
            )
        return bool(value)

    def table(self, key: str) -> dict[str, object]:
        """An object; empty if it is left out."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"config: {self.key(key)} is {value!r}, an object is expected")
        return value or {}

    @property
    def head_dim(self) -> int:
        width, num_heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        size = self.integer("head_dim", max(1, width // num_heads))
        if size > MOST_HEAD:
            raise CheckpointError(
                f"config: heads of {size:,} numbers, up to {MOST_HEAD:,} are known"
            )
        return size

    def has(self, part: str) -> bool:
        """Does any tensor's name end so?"""
        return any(name.endswith(part) for name in self.names)
