"""Which keys of a config change the arithmetic, and what becomes of those that nobody reads.

A family file lists the keys it heeds with what transformers' class takes for one that is left out
(`DEFAULTS`), and the keys that it heeds in some values only (`FIXED`). All others:

Hugging Face: the hub is full of harmless additions, so that a config is refused for an unknown key only if
the key's name speaks of arithmetic (`WORDS`) and its value is not one that says "nothing of this kind".
GGUF: keys of the architecture are few and defined by one project, so that an unknown one is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from outsize.errors import UnsupportedError
from outsize.family.config import FEW_KEYS, GGUF_KEYS, Config, plain

Fixed = Mapping[str, tuple[object, ...]]
NOTHING: tuple[object, ...] = (None, False, 0, "", [], {})  # no bias, no window, ...
WORDS = {
    "scale", "scales", "scaled", "scaling", "scalar", "multiplier", "mscale", "alpha", "bias", "cap",
    "capping", "softcap", "softcapping", "clip", "clamp", "norm", "layernorm", "rmsnorm", "rope",
    "rotary", "yarn", "alibi", "window", "sliding", "act", "activation", "gating", "sink", "sinks",
    "expert", "experts",
}  # fmt: skip
MULTIPLIERS = {"scale", "scales", "scaling", "scalar", "multiplier", "mscale", "factor"}
# Of how a model was trained, kept, split over devices or is sampled from; or said again elsewhere; or of
# parts that a family does not have.
NEUTRAL = {
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "torch_dtype",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "initializer_range", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp", "attention_dropout", "_name_or_path",
    "model_type", "output_attentions", "output_router_logits", "router_aux_loss_coef",
    "router_jitter_noise", "_sliding_window_pattern", "neftune_noise_alpha", "experts_per_token",
    "_attn_implementation", "attn_implementation", "max_window_layers", "intermediate_size", "head_dim",
    "qk_head_dim", "resid_pdrop", "embd_pdrop", "aux_loss_alpha", "seq_aux", "block_norm_eps", "dropout",
    "hidden_dropout", "layerdrop", "init_std",
    "num_kv_heads",  # of falcon, which has one where it is run
}  # fmt: skip
# Known in these values only, by all families.
FIXED: dict[str, tuple[object, ...]] = {
    "is_encoder_decoder": (False,),
    "is_causal": (None, True),
    "causal": (None, True),
    "parallel_residual": (None, False),
    "use_parallel_residual": (None, False),
    "position_embedding_type": (None, "rope", "rotary"),
    "normalize_embedding": (None, False),
    "attn_temperature_tuning": (None, False),
    "attention_chunk_size": (None,),
    "first_k_dense_replace": (None, 0),
    "attn_type": (None, "full"),
    "add_cross_attention": (False,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "partial_rotary_factor": (None, 1),
    "rope_interleaved": (False,),
}
# `attention.sliding_window` is heeded where llama.cpp heeds it: gemma3 and gpt-oss.
READ = set(GGUF_KEYS.values()) | {
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scale_linear",
}  # fmt: skip
# In texts, sections of multimodal ropes say nothing: the positions of a token that they take are one.
GGUF_NEUTRAL = {
    "vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "mm.tokens_per_image",
    "rope.dimension_sections",
}  # fmt: skip
GGUF_FIXED: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "expert_gating_func": (0, 1),  # softmax
    "interleave_moe_layer_step": (0, 1),
    "logit_scale": (0, 1.0),
    "attention.scale": (0,),
}


def check(
    family: str, stated: Mapping[str, object], heeded: Mapping[str, object], own: Fixed
) -> None:
    """Raises UnsupportedError for a key of a Hugging Face config that is not heeded as it should be."""
    fixed = {key: allowed for key, allowed in FIXED.items() if key not in heeded} | dict(own)
    for key, value in stated.items():
        if key in heeded and key not in fixed:
            continue
        if key in fixed:
            allowed = fixed[key]
        elif key in NEUTRAL or not WORDS & set(key.split("_")):
            continue
        else:
            allowed = (*NOTHING, 1) if MULTIPLIERS & set(key.split("_")) else NOTHING
        if not any(value is a or (value == a and value is not True) for a in allowed):
            raise _refusal(family, key, value, allowed)


def check_gguf(config: Config, own: Collection[str] = ()) -> None:
    """Raises UnsupportedError for a key of a GGUF's architecture that is not heeded as it should be. `own`:
    those that the family reads beside the usual ones, under Hugging Face's names."""
    prefix, head, read = f"{config.architecture}.", config.head_dim, {FEW_KEYS[k] for k in own}
    sizes = {"attention.value_length": (head,), "rope.dimension_count": (head,)}
    fixed = {k: v for k, v in (GGUF_FIXED | sizes).items() if k not in read}
    for full, value in config.values.items():
        key = full.removeprefix(prefix)
        if key == full or key in READ | read or key in GGUF_NEUTRAL or key.startswith("vision."):
            continue
        value = plain(value)
        allowed = fixed.get(key, (0,))
        if value not in allowed and (not isinstance(value, list) or any(value)):
            raise _refusal(config.architecture, full, value, allowed)


def _refusal(family: str, key: str, value: object, allowed: tuple[object, ...]) -> UnsupportedError:
    known = ", ".join(map(repr, allowed))
    return UnsupportedError(
        f"config: {key} is {repr(value)[:80]}, which outsize does not know for {family}; known are {known}"
    )
