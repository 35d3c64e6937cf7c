"""Tiny random models, the same on every machine: weights from numpy's seeded generator, in Hugging
Face's layout. The committed vectors (*.npz) were made from these folders by make.py."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

DENSE = 32  # of Flex-MemoryLLM's second feed-forward
VOCAB, WIDTH, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 288, 64, 96, 3, 4, 2, 32
TOKENS = [(7 * i * i + 3 * i + 11) % VOCAB for i in range(40)]

EXPERTS = 8
OLD_MIXTURES = ("olmoe", "mixtral", "qwen3_moe", "gpt_oss")
NEW_MIXTURES = (
    "qwen2_moe", "granitemoe", "minimax_m2", "glm4_moe", "deepseek_v3", "glm4_moe_lite", "llama4",
    "qwen3_next", "qwen3_5_moe", "gemma4+experts",
)  # fmt: skip
MIXTURES = (*OLD_MIXTURES, *NEW_MIXTURES)

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3, "rope_theta": 10000.0, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 8, "rope_theta": 10000.0, "tie_word_embeddings": False},
    "qwen2": {"rope_theta": 1e6, "tie_word_embeddings": True, "use_sliding_window": False},
    "qwen3": {"rope_theta": 1e6, "tie_word_embeddings": False, "attention_bias": False},
    "gemma3": {
        "sliding_window": 8,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "afm": {"rope_theta": 500000.0, "tie_word_embeddings": True, "attention_bias": False},
    "olmoe": {
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "clip_qkv": None,
        "head_dim": WIDTH // HEADS,
    },
    "mixtral": {
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen3_moe": {
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    },
    "gpt_oss": {
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
            "rope_theta": 150000.0,
        },
        "tie_word_embeddings": False,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attention_bias": True,
        "swiglu_limit": 7.0,
    },
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
SHORT, LONG = [1.0 + 0.05 * i for i in range(16)], [1.0 + 0.5 * i for i in range(16)]
SIGMOID: dict[str, Any] = {
    "n_routed_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
    "n_shared_experts": 1, "routed_scaling_factor": 1.8, "norm_topk_prob": True,
    "num_nextn_predict_layers": 0, "tie_word_embeddings": False,
}  # fmt: skip
LATENT: dict[str, Any] = {
    **SIGMOID, "kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
    "v_head_dim": 24, "num_key_value_heads": HEADS, "rope_theta": 10000.0,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "tie_word_embeddings": False,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "attention_bias": False,
    "full_attention_interval": 2,
}  # fmt: skip
DELTA_EXPERTS: dict[str, Any] = {
    "num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
MROPE: dict[str, Any] = {
    "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5, "mrope_interleaved": True,
    "mrope_section": [4, 2, 2],
}  # fmt: skip
GEMMA4_ROPES: dict[str, Any] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e6,
    },
}
TOKEN = 128  # numbers of a token in a layer of Gemma 4
# Families whose tensors' names and shapes are in shapes.json, as transformers writes their checkpoints.
CONFIGS |= {
    "qwen2_moe": {
        "rope_theta": 1e6, "tie_word_embeddings": False, "num_experts": EXPERTS, "num_experts_per_tok": 3,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128, "norm_topk_prob": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False, "head_dim": 16,
    },
    "phi3": {
        "rope_theta": 10000.0, "tie_word_embeddings": False, "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT[:6], "long_factor": LONG[:6]},
        "partial_rotary_factor": 0.75, "sliding_window": 24,
    },
    "granite": {
        "rope_theta": 10000.0, "tie_word_embeddings": True, "embedding_multiplier": 12.0,
        "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625,
        "attention_bias": False, "mlp_bias": False, "head_dim": 16,
    },
    "granitemoe": {
        "rope_theta": 10000.0, "tie_word_embeddings": True, "embedding_multiplier": 12.0,
        "logits_scaling": 6.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625,
        "num_local_experts": EXPERTS, "num_experts_per_tok": 3, "attention_bias": False, "head_dim": 16,
    },
    "olmo2": {"rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False, "head_dim": 16},
    "olmo3": {
        "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False, "head_dim": 16,
        "sliding_window": 8, "layer_types": SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            "full_attention": {
                "rope_type": "yarn", "rope_theta": 500000.0, "factor": 8.0, "attention_factor": 1.2,
                "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 16,
            },
        },
    },
    "smollm3": {
        "rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layers": [1, 0, 1],
        "no_rope_layer_interval": 2, "use_sliding_window": False, "attention_bias": False,
        "mlp_bias": False, "head_dim": 16,
    },
    "ministral3": {
        "tie_word_embeddings": False, "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "gemma2": {
        "rope_theta": 1e4, "tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 32,
        "layer_types": SLIDING, "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0, "attention_bias": False,
    },
    "minimax_m2": {
        "rope_theta": 5e6, "tie_word_embeddings": False, "num_local_experts": EXPERTS,
        "num_experts_per_tok": 3, "rotary_dim": 16,
    },
    "glm4_moe": {
        **SIGMOID, "rope_theta": 1e6, "partial_rotary_factor": 0.5, "attention_bias": True,
        "use_qk_norm": True, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    },
    "deepseek_v3": {
        **LATENT, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "rope_scaling": {
            "type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "original_max_position_embeddings": 16,
        },
    },
    "llama4": {
        "rope_theta": 5e5, "tie_word_embeddings": False, "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2, "intermediate_size": 64, "intermediate_size_mlp": 96,
        "no_rope_layers": [1, 0, 1], "interleave_moe_layer_step": 1,
        "attention_chunk_size": 16, "attn_temperature_tuning": True, "floor_scale": 8, "attn_scale": 0.1,
        "use_qk_norm": True, "attention_bias": False,
    },
    "opt": {
        "ffn_dim": FFN, "activation_function": "relu", "enable_bias": True, "do_layer_norm_before": True,
        "word_embed_proj_dim": WIDTH, "tie_word_embeddings": True,
    },
    "falcon": {
        "ffn_hidden_size": FFN, "activation": "gelu", "bias": False, "alibi": False, "multi_query": True,
        "parallel_attn": True, "new_decoder_architecture": False, "rope_theta": 10000.0,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
    "memoryllm": {
        "rope_theta": 10000.0, "tie_word_embeddings": True, "dense_intermediate_size": 0,
    },
    "glm4_moe_lite": {
        **LATENT, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "qwen3_next": {**DELTA, **DELTA_EXPERTS, "norm_topk_prob": True, "decoder_sparse_step": 1,
                   "mlp_only_layers": [], "rope_theta": 1e7, "partial_rotary_factor": 0.5},
    "lfm2": {
        "norm_eps": 1e-5, "tie_word_embeddings": True, "conv_L_cache": 3, "conv_bias": False,
        "full_attn_idxs": [1], "block_auto_adjust_ff_dim": True, "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0, "rope_theta": 1e6, "head_dim": 16, "block_ff_dim": 144,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "gemma4": {
        "sliding_window": 8, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "global_head_dim": 48,
        "hidden_size_per_layer_input": TOKEN, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 1,
        "use_double_wide_mlp": True, "final_logit_softcapping": 10.0, "attention_bias": False,
        "rope_parameters": GEMMA4_ROPES,
    },
    "qwen3_5": {**DELTA, "rope_parameters": MROPE},
    "qwen3_5_moe": {**DELTA, **DELTA_EXPERTS, "rope_parameters": MROPE},
}  # fmt: skip
STORED = json.loads((Path(__file__).with_name("shapes.json")).read_text())
CLASSIC = ("opt", "falcon")  # of before 2023: with other keys
USUAL_KEYS = ("intermediate_size", "num_key_value_heads", "head_dim", "rms_norm_eps")
# The transformers class that runs a family: AFM's architecture is Qwen3's with other numbers.
REFERENCE = {
    "gemma3": "gemma3_text", "gemma4": "gemma4_text", "afm": "qwen3", "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text",
}  # fmt: skip


# Families with layers that keep a state of the sequence in place of keys and values.
READS_TOKENS = ("memoryllm", "gemma4")  # in every layer
STATEFUL = ("lfm2", "qwen3_next", "qwen3_5", "qwen3_5_moe")
# Families with what few of their checkpoints have; no vectors are kept of these.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "memoryllm+dense": ("memoryllm", {"dense_intermediate_size": DENSE}),
    "llama+biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama+relu": ("llama", {"hidden_act": "relu"}),
    "gemma4+experts": (
        "gemma4",
        {
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": EXPERTS,
            "top_k_experts": 3,
            "moe_intermediate_size": 64,
        },
    ),
    # With neurons that three ranks can share unevenly.
    **{
        f"{base}+wide": (base, {"intermediate_size": 320})
        for base in ("llama", "qwen2", "qwen3", "gemma3")
    },
}


def config(family: str) -> dict[str, Any]:
    """Of a family, for this call alone: transformers' classes write into the tables that they are given."""
    base, more = VARIANTS.get(family, (family, {}))
    common = {k: v for k, v in COMMON.items() if base not in CLASSIC or k not in USUAL_KEYS}
    made = common | CONFIGS[base] | more | {"model_type": base}
    return {
        k: deepcopy(v)
        for k, v in made.items()
        if (k != "head_dim" or not (base == "phi3" or "kv_lora_rank" in made))
        and (k != "rms_norm_eps" or base != "lfm2")
    }


def expert_shapes(family: str, layer: str) -> dict[str, tuple[int, ...]]:
    """Router and experts of a layer."""
    if family == "gpt_oss":
        e = layer + "mlp.experts."
        return {
            f"{layer}mlp.router.weight": (EXPERTS, WIDTH),
            f"{layer}mlp.router.bias": (EXPERTS,),
            f"{e}gate_up_proj": (EXPERTS, WIDTH, 2 * FFN),
            f"{e}gate_up_proj_bias": (EXPERTS, 2 * FFN),
            f"{e}down_proj": (EXPERTS, FFN, WIDTH),
            f"{e}down_proj_bias": (EXPERTS, WIDTH),
            f"{layer}self_attn.sinks": (HEADS,),
            f"{layer}self_attn.o_proj.bias": (WIDTH,),
        }
    width = 64 if family == "qwen3_moe" else FFN
    block = layer + ("block_sparse_moe." if family == "mixtral" else "mlp.")
    up, down = (width, WIDTH), (WIDTH, width)
    named = {"w1": up, "w2": down, "w3": up}
    if family != "mixtral":
        named = {"gate_proj": up, "down_proj": down, "up_proj": up}
    out: dict[str, tuple[int, ...]] = {f"{block}gate.weight": (EXPERTS, WIDTH)}
    for e in range(EXPERTS):
        out |= {f"{block}experts.{e}.{n}.weight": shape for n, shape in named.items()}
    return out


def gemma4_experts() -> dict[str, tuple[int, ...]]:
    """Of the 26B's kind: experts beside a dense feed-forward; one key head, no values, where all is seen."""
    found = {n: tuple(s) for n, s in STORED["gemma4"].items() if "per_layer" not in n}
    for i in range(LAYERS):
        p, big = f"model.layers.{i}.", STORED["gemma4"]["model.layers.1.self_attn.k_norm.weight"][0]
        for n in (
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
            "pre_feedforward_layernorm_2",
        ):
            found[f"{p}{n}.weight"] = (WIDTH,)
        found |= {
            p + "router.proj.weight": (EXPERTS, WIDTH), p + "router.scale": (WIDTH,),
            p + "router.per_expert_scale": (EXPERTS,), p + "experts.gate_up_proj": (EXPERTS, 128, WIDTH),
            p + "experts.down_proj": (EXPERTS, WIDTH, 64),
            **{f"{p}mlp.{n}_proj.weight": (FFN, WIDTH) for n in ("gate", "up")},
            p + "mlp.down_proj.weight": (WIDTH, FFN),
        }  # fmt: skip
        if i:
            found.pop(p + "self_attn.v_proj.weight", None)
            found |= {
                p + "self_attn.k_proj.weight": (big, WIDTH),
                p + "self_attn.k_norm.weight": (big,),
            }
    return found


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes, in Hugging Face's naming."""
    if family == "gemma4+experts":
        return gemma4_experts()
    if family in STORED:
        return {name: tuple(shape) for name, shape in STORED[family].items()}
    settings, variant = config(family), family
    head_dim, ffn = settings["head_dim"], settings["intermediate_size"]
    family = VARIANTS.get(family, (family, {}))[0]
    q, kv = HEADS * head_dim, KV_HEADS * head_dim
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        out |= {
            p + "input_layernorm.weight": (WIDTH,),
            p + "post_attention_layernorm.weight": (WIDTH,),
            p + "self_attn.q_proj.weight": (q, WIDTH),
            p + "self_attn.k_proj.weight": (kv, WIDTH),
            p + "self_attn.v_proj.weight": (kv, WIDTH),
            p + "self_attn.o_proj.weight": (WIDTH, q),
        }
        if family in MIXTURES:
            out |= expert_shapes(family, p)
        else:
            out |= {
                p + "mlp.gate_proj.weight": (ffn, WIDTH),
                p + "mlp.up_proj.weight": (ffn, WIDTH),
                p + "mlp.down_proj.weight": (WIDTH, ffn),
            }
        if family == "olmoe":
            out |= {f"{p}self_attn.{n}_norm.weight": (s,) for n, s in (("q", q), ("k", kv))}
        if family in ("qwen2", "gpt_oss"):
            biases = {"q": q, "k": kv, "v": kv}
            out |= {f"{p}self_attn.{n}_proj.bias": (size,) for n, size in biases.items()}
        if family in ("qwen3", "gemma3", "afm", "qwen3_moe"):
            out |= {f"{p}self_attn.{n}_norm.weight": (HEAD_DIM,) for n in "qk"}
        if family == "gemma3":
            names = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
            out |= {f"{p}{n}.weight": (WIDTH,) for n in names}
    if family == "memoryllm":
        out = memory_shapes(out, settings["dense_intermediate_size"])
    out["model.norm.weight"] = (WIDTH,)
    if not settings["tie_word_embeddings"]:
        out["lm_head.weight"] = (VOCAB, WIDTH)
    if variant == "llama+biases":
        parts = [f"{n}_proj.weight" for n in ("q", "k", "v", "o", "gate", "up", "down")]
        maps = {n: s for n, s in out.items() if n.endswith(tuple(parts))}
        out |= {f"{n.removesuffix('weight')}bias": s[:1] for n, s in maps.items()}
    return out


def memory_shapes(out: dict[str, tuple[int, ...]], inner: int) -> dict[str, tuple[int, ...]]:
    """Of llama's tensors, those of feed-forwards of the embedding; in Flex also of a dense one beside."""
    old, new = "post_attention_layernorm", "memory_layernorm"
    made = {name.replace(old, new): shape for name, shape in out.items()}
    for i in range(LAYERS if inner else 0):
        p = f"model.layers.{i}."
        made[f"{p}{old}.weight"] = (WIDTH,)
        made |= {f"{p}dense_mlp.{k}_proj.weight": (inner, WIDTH) for k in ("gate", "up")}
        made[f"{p}dense_mlp.down_proj.weight"] = (WIDTH, inner)
    return made


SHIFTED = ("gemma2", "gemma3", "qwen3_next", "qwen3_5", "qwen3_5_moe")  # norms are stored as w - 1


def weights(family: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(20260822)
    return {
        name: (random.standard_normal(shape) * (0.2 if "norm" not in name else 0.1)
               + ("norm" in name and (family not in SHIFTED or "linear" in name))).astype(np.float32)
              * np.float32(0.4 if "gemma4" in family and re.search("[qk]_norm", name) else 1)
        for name, shape in shapes(family).items()
    }  # fmt: skip


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: 256 bytes, then special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"] + [f"<extra{i}>" for i in range(VOCAB - 258)])
    return made


TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def write_folder(folder: Path, family: str, model_type: str | None = None) -> Path:
    """A safetensors folder as Hugging Face would save it."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(family) | ({"model_type": model_type} if model_type else {})
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(tokenizer().to_str())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    save_file(weights(family), folder / "model.safetensors")
    return folder
