"""A family's tiny model as a GGUF, as llama.cpp's converter makes one: its tensors' names by the `gguf`
package's tables, its metadata, and what it does to tensors' numbers (conversion/*.py of llama.cpp)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.golden import tiny

# Our family -> the architecture that the converter gives its models.
ARCHITECTURES = {
    "qwen2_moe": "qwen2moe", "phi3": "phi3", "granite": "granite", "granitemoe": "granitemoe",
    "olmo2": "olmo2", "olmo3": "olmo2", "smollm3": "smollm3", "ministral3": "mistral3", "gemma2": "gemma2",
    "minimax_m2": "minimax-m2", "glm4_moe": "glm4moe", "deepseek_v3": "deepseek2",
    "glm4_moe_lite": "deepseek2", "llama4": "llama4", "qwen3_next": "qwen3next", "qwen3_5": "qwen35",
    "qwen3_5_moe": "qwen35moe", "lfm2": "lfm2", "falcon": "falcon", "gemma4": "gemma4",
}  # fmt: skip
VARIANTS = {"gemma4+experts": "gemma4"}
PERMUTED = (
    "granite",
    "granitemoe",
    "smollm3",
    "ministral3",
)  # query and key rows in adjacent pairs
MULTIPLIERS = {
    "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
}  # fmt: skip
SIGMOID = {
    "moe_intermediate_size": "expert_feed_forward_length", "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count", "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale", "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count", "topk_group": "expert_group_used_count",
    "num_nextn_predict_layers": "nextn_predict_layers",
}  # fmt: skip
LATENT = {
    "q_lora_rank": "attention.q_lora_rank", "kv_lora_rank": "attention.kv_lora_rank",
    "v_head_dim": "attention.value_length_mla", "qk_rope_head_dim": "rope.dimension_count",
}  # fmt: skip


def metadata(family: str) -> dict[str, object]:
    """The keys of the architecture, without its name."""
    s = tiny.config(family)
    head = s.get("head_dim", tiny.WIDTH // tiny.HEADS)
    rope = s.get("rope_parameters") or s.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)
    out: dict[str, object] = {
        "block_count": tiny.LAYERS, "context_length": 512, "embedding_length": tiny.WIDTH,
        "feed_forward_length": tiny.FFN, "attention.head_count": tiny.HEADS,
        "attention.head_count_kv": tiny.KV_HEADS, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": float(s.get("rope_theta") or rope["rope_theta"]), "vocab_size": tiny.VOCAB,
        "attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head,
    }  # fmt: skip
    if "num_experts_per_tok" in s:
        out |= {"expert_used_count": s["num_experts_per_tok"], "expert_count": tiny.EXPERTS}
    if rope.get("rope_type", rope.get("type")) == "yarn":
        out |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }  # fmt: skip
    out |= {own: s[key] for key, own in (MULTIPLIERS | SIGMOID).items() if key in s}
    return out | OWN.get(family, lambda s: {})(s)


def _windows(s: dict[str, Any]) -> dict[str, object]:
    kinds = [kind == "sliding_attention" for kind in s["layer_types"]]
    return {
        "attention.sliding_window": s["sliding_window"],
        "attention.sliding_window_pattern": kinds,
    }


def _olmo3(s: dict[str, Any]) -> dict[str, object]:
    """A factor of attention is stated as what YaRN's own is multiplied by."""
    rope = s["rope_parameters"]["full_attention"]
    usual = 0.1 * np.log(rope["factor"]) + 1.0
    return _windows(s) | {"rope.scaling.attn_factor": float(rope["attention_factor"] / usual)}


def _phi3(s: dict[str, Any]) -> dict[str, object]:
    factor = 512 / s["original_max_position_embeddings"]
    scale = (1 + np.log(factor) / np.log(s["original_max_position_embeddings"])) ** 0.5
    return {
        "rope.dimension_count": 12, "attention.sliding_window": s["sliding_window"],
        "rope.scaling.original_context_length": s["original_max_position_embeddings"],
        "rope.scaling.attn_factor": float(scale),
    }  # fmt: skip


def _gemma2(s: dict[str, Any]) -> dict[str, object]:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return {k: s[k] for k in caps} | {"attention.sliding_window": s["sliding_window"]}


def _latent(s: dict[str, Any]) -> dict[str, object]:
    rank, rope = s["kv_lora_rank"], s["qk_rope_head_dim"]
    out: dict[str, object] = {own: s[key] for key, own in LATENT.items()}
    out |= {
        "attention.head_count_kv": 1, "attention.key_length": rank + rope, "attention.value_length": rank,
        "attention.key_length_mla": s["qk_nope_head_dim"] + rope, "expert_gating_func": 2,
    }  # fmt: skip
    if "first_k_dense_replace" not in s:
        out["leading_dense_block_count"] = s["mlp_layer_types"].count("dense")
    if "rope_scaling" in s:
        out["rope.scaling.yarn_log_multiplier"] = 0.1 * s["rope_scaling"]["mscale_all_dim"]
    return out


def _falcon(s: dict[str, Any]) -> dict[str, object]:
    head = tiny.WIDTH // tiny.HEADS
    sizes = ("key_length", "value_length")
    return {f"attention.{k}": head for k in sizes} | {
        "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": None,
        "attention.layer_norm_epsilon": s["layer_norm_epsilon"], "rope.dimension_count": head,
        "rope.freq_base": None, "tensor_data_layout": "jploski",
    }  # fmt: skip


def _delta(s: dict[str, Any]) -> dict[str, object]:
    """A GGUF says layers' kinds by the interval alone: here every second one is of attention."""
    heads = s["linear_num_value_heads"]
    out: dict[str, object] = {
        "ssm.conv_kernel": s["linear_conv_kernel_dim"], "ssm.state_size": s["linear_key_head_dim"],
        "ssm.group_count": s["linear_num_key_heads"], "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * s["linear_value_head_dim"], "full_attention_interval": 2,
        "rope.dimension_count": tiny.HEAD_DIM // 2,
    }  # fmt: skip
    if "rope_parameters" in s:
        out["rope.dimension_sections"] = [*s["rope_parameters"]["mrope_section"], 0]
    if "num_experts" in s:
        out["expert_feed_forward_length"] = s["moe_intermediate_size"]
        out["expert_shared_feed_forward_length"] = s["shared_expert_intermediate_size"]
    return out


def _gemma4(s: dict[str, Any]) -> dict[str, object]:
    """Sizes without more words are those of layers that see all."""
    count, shared = tiny.LAYERS, s["num_kv_shared_layers"]
    far, near, ropes = s["global_head_dim"], s["head_dim"], s["rope_parameters"]
    inner = [tiny.FFN] * (count - shared) + [2 * tiny.FFN] * shared
    out: dict[str, object] = _windows(s) | {
        "attention.key_length": far, "attention.value_length": far, "rope.dimension_count": far,
        "attention.key_length_swa": near, "attention.value_length_swa": near,
        "rope.dimension_count_swa": near, "attention.shared_kv_layers": shared,
        "rope.freq_base_swa": ropes["sliding_attention"]["rope_theta"],
        "embedding_length_per_layer_input": s["hidden_size_per_layer_input"],
        "final_logit_softcapping": s["final_logit_softcapping"],
        "feed_forward_length": inner if s["use_double_wide_mlp"] else tiny.FFN,
    }  # fmt: skip
    if s.get("enable_moe_block"):
        heads = s["num_global_key_value_heads"]
        kinds = (kind == "sliding_attention" for kind in s["layer_types"])
        out |= {
            "expert_count": tiny.EXPERTS, "expert_used_count": s["top_k_experts"],
            "expert_feed_forward_length": s["moe_intermediate_size"],
            "attention.head_count_kv": [tiny.KV_HEADS if near else heads for near in kinds],
        }  # fmt: skip
    return out


OWN = {
    "gemma4": _gemma4,
    "gemma4+experts": _gemma4,
    "lfm2": lambda s: {
        "shortconv.l_cache": s["conv_L_cache"], "feed_forward_length": tiny.FFN,
        "attention.head_count_kv": [0, tiny.KV_HEADS, 0],
    },
    "qwen3_next": _delta,
    "qwen3_5": _delta,
    "qwen3_5_moe": _delta,
    "qwen2_moe": lambda s: {
        "expert_feed_forward_length": s["moe_intermediate_size"],
        "expert_shared_feed_forward_length": s["shared_expert_intermediate_size"],
    },
    "phi3": _phi3,
    "olmo3": _olmo3,
    "gemma2": _gemma2,
    "ministral3": lambda s: {
        "rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.1,
    },
    "minimax_m2": lambda s: {
        "rope.dimension_count": s["rotary_dim"], "expert_gating_func": 2,
        "expert_feed_forward_length": tiny.FFN,
    },
    "glm4_moe": lambda s: {"rope.dimension_count": tiny.HEAD_DIM // 2, "expert_gating_func": 2},
    "llama4": lambda s: {
        "feed_forward_length": s["intermediate_size_mlp"], "interleave_moe_layer_step": 1,
        "expert_feed_forward_length": s["intermediate_size"],
    },
    "falcon": _falcon,
    "deepseek_v3": _latent,
    "glm4_moe_lite": _latent,
}  # fmt: skip


def _stacked(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts of a layer as one tensor of all."""
    out: dict[str, np.ndarray] = {}
    lists: dict[str, list[np.ndarray]] = {}
    for name, w in weights.items():
        whole = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        if whole == name:
            out[name] = w
            continue
        number = int(re.findall(r"experts\.(\d+)\.", name)[0])
        lists.setdefault(whole, [w] * tiny.EXPERTS)[number] = w
    return out | {name: np.stack(ws) for name, ws in lists.items()}


def tensors(family: str) -> dict[str, np.ndarray]:
    """Under the names of a GGUF."""
    architecture, s = (ARCHITECTURES | VARIANTS)[family], tiny.config(family)
    kind = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table, out = gguf.get_tensor_name_map(kind, tiny.LAYERS), {}
    for name, w in _stacked(tiny.weights(family)).items():
        for foreign, numbers in _changed(family, s, name, w):
            named = foreign.endswith(".scale")
            found = foreign if named else table.get_name(foreign, (".weight", ".bias"))
            assert found is not None, foreign
            out[found] = np.ascontiguousarray(numbers.squeeze())
    if architecture == "gemma4":
        pairs = s["global_head_dim"] // 2
        turned = int(pairs * s["rope_parameters"]["full_attention"]["partial_rotary_factor"])
        factors = [1.0] * turned + [1e30] * (pairs - turned)
        out["rope_freqs.weight"] = np.array(factors, np.float32)
    if family == "phi3":
        for length in ("short", "long"):
            factors = s["rope_scaling"][f"{length}_factor"]
            out[f"rope_factors_{length}.weight"] = np.array(factors, np.float32)
    return out


def _changed(
    family: str, s: dict[str, Any], name: str, w: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    """What the converter makes of a tensor: names that its tables know, and numbers."""
    layer = ".".join(name.split(".")[:3])
    if family == "gemma2" and "norm" in name:
        w = w + 1
    if name.endswith(".router.scale"):
        return [(f"blk.{layer.split('.')[2]}.ffn_gate_inp.scale", w)]
    if name.endswith(".per_expert_scale"):
        return [(f"blk.{layer.split('.')[2]}.ffn_down_exps.scale", w)]
    if (
        name.endswith(("layer_scalar", "experts.gate_up_proj", "experts.down_proj"))
        and "gemma4" in family
    ):
        return [(f"{name}.weight", w)]
    if "linear_num_key_heads" in s:
        return _changed_delta(family, s, name, w)
    if family in PERMUTED and ("q_proj" in name or "k_proj" in name):
        heads = tiny.HEADS if "q_proj" in name else tiny.KV_HEADS
        w = w.reshape(heads, 2, len(w) // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)
    if "kv_b_proj" in name:
        key, value = s["qk_nope_head_dim"], s["v_head_dim"]
        both = w.reshape(tiny.HEADS, key + value, -1)
        return [
            (name.replace("kv_b", "k_b"), both[:, :key].swapaxes(1, 2)),
            (name.replace("kv_b", "v_b"), both[:, key:]),
        ]
    if family == "llama4" and ".experts." in name:  # columns, gate's before up's
        w, name = w.swapaxes(1, 2), f"{name}.weight"
        if "gate_up" in name:
            halves = zip(("gate", "up"), np.split(w, 2, axis=1), strict=True)
            return [(name.replace("gate_up", k), half) for k, half in halves]
    if "input_linear" in name:
        halves = zip(("gate", "up"), np.split(w, 2, axis=1), strict=True)
        return [(f"{layer}.mlp.experts.{k}_proj.weight", half) for k, half in halves]
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    if family == "minimax_m2" and ".experts." in name:
        name = name.replace("block_sparse_moe", "feed_forward").removeprefix("model.")
    return [(name, w)]


def _changed_delta(
    family: str, s: dict[str, Any], name: str, w: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    """Of Qwen3-Next and Qwen3.5: inputs of Qwen3-Next are sorted, value heads of Qwen3.5 turned around."""
    key_heads, heads = s["linear_num_key_heads"], s["linear_num_value_heads"]
    key, value, each = s["linear_key_head_dim"], s["linear_value_head_dim"], heads // key_heads
    layer = ".".join(name.split(".")[:3])
    if name.endswith("norm.weight") and "linear_attn" not in name:
        w = w + 1
    if "gate_up_proj" in name:
        halves = zip(("gate", "up"), np.split(w, 2, axis=1), strict=True)
        return [(f"{layer}.mlp.experts.{k}_proj.weight", half) for k, half in halves]
    if name.endswith("experts.down_proj"):
        name += ".weight"
    if "in_proj_qkvz" in name:
        ends = np.cumsum([key, key, each * value])
        parts = np.split(w.reshape(key_heads, -1, tiny.WIDTH), ends, axis=1)
        q, k, v, z = (part.reshape(-1, tiny.WIDTH) for part in parts)
        inner = f"{layer}.linear_attn.in_proj"
        return [(f"{inner}_qkv.weight", np.concatenate([q, k, v])), (f"{inner}_z.weight", z)]

    def turned(some: np.ndarray, size: int) -> np.ndarray:
        if family == "qwen3_next":
            return some
        return some.reshape(key_heads, each, size, -1).swapaxes(0, 1).reshape(some.shape)

    if "in_proj_qkv" in name or "conv1d" in name:
        first = 2 * key_heads * key
        w = np.concatenate([w[:first], turned(w[first:], value)])
    elif "in_proj_z" in name or "in_proj_a" in name or "in_proj_b." in name:
        w = turned(w, value if "in_proj_z" in name else 1)
    elif name.endswith(("A_log", "dt_bias")):
        w = turned(-np.exp(w) if name.endswith("A_log") else w, 1)
        name = name.replace("dt_bias", "dt_proj.bias")
    elif "linear_attn.out_proj" in name:
        w = turned(np.ascontiguousarray(w.T), value).T
    return [(name, w)]


def write(
    path: Path,
    family: str,
    change: dict[str, object] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    coded: dict[str, tuple[np.ndarray, str]] | None = None,
) -> Path:
    """`change`: other keys, or further ones; None: the key is left out. `weights`: other tensors. `coded`:
    those of them that are quantized, and how."""
    architecture = (ARCHITECTURES | VARIANTS)[family]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata(family) | (change or {})).items():
        full = f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        elif value is not None:
            writer.add_array(full, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    vocab = sorted(tiny.tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([name for name, _ in vocab[:-1]] + ["Ġa"])
    writer.add_token_types([1] * 256 + [3] * (tiny.VOCAB - 257) + [1])
    writer.add_token_merges(["Ġ a"])
    for name, w in (tensors(family) if weights is None else weights).items():
        raw, kind = (coded or {}).get(name, (w, ""))
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind] if kind else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
