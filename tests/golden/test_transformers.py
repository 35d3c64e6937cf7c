"""What the committed vectors do not cover: fp32 logits equal transformers', made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import outsize
from outsize.engine import load as loading
from tests.golden import tiny
from tests.golden.test_golden import TOLERANCE, logits

transformers = pytest.importorskip("transformers", minversion="5.20")

SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA4 = {
    "head_dim": 32, "global_head_dim": 48, "sliding_window": 8, "tie_word_embeddings": True,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "vocab_size_per_layer_input": tiny.VOCAB, "hidden_size_per_layer_input": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "both_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "gelu": ("Llama", {"hidden_act": "gelu", "mlp_bias": True}),
    "relu": ("Llama", {"hidden_act": "relu"}),
    "relu_squared": ("Llama", {"hidden_act": "relu2"}),
    "qwen3_bias": ("Qwen3", {"attention_bias": True}),
    "gemma3_bias": ("Gemma3Text", {"attention_bias": True, "head_dim": 32, "tie_word_embeddings": True}),
    "layer_types": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": KINDS}),
    "max_window_layers": (
        "Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "unused_window": ("Qwen2", {"sliding_window": 8}),
    "moe": ("Qwen3Moe", {"use_sliding_window": True, "sliding_window": 8, "num_experts": 4,
                         "num_experts_per_tok": 2, "moe_intermediate_size": 64, "attention_bias": True}),
    "moe_gelu": ("Mixtral", {"hidden_act": "gelu", "num_local_experts": 4}),
    "no_bias": ("GptOss", {"attention_bias": False, "head_dim": 32, "num_local_experts": 4,
                           "num_experts_per_tok": 2, "sliding_window": 8}),
    "interleaved": ("Llama4Text", {
        "intermediate_size_mlp": 128, "interleave_moe_layer_step": 2, "num_local_experts": 4, "head_dim": 16,
        "attention_chunk_size": 8, "no_rope_layers": [1, 0, 1], "floor_scale": 4, "use_qk_norm": False}),
    "gemma4_shared": ("Gemma4Text", GEMMA4 | {
        "num_hidden_layers": 6, "layer_types": [*KINDS[:2], *KINDS[:2], *KINDS[:2]],
        "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 20.0}),
    "gemma4_no_rows": ("Gemma4Text", GEMMA4 | {
        "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma4_experts": ("Gemma4Text", GEMMA4 | {
        "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        "enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 64}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "yarn": ("Qwen3", {"rope_parameters": YARN, "max_position_embeddings": 16}),
    "yarn_mscale": ("Llama", {"rope_parameters": YARN | {
        "mscale": 1.0, "mscale_all_dim": 0.5, "original_max_position_embeddings": 16}}),
    "yarn_factor": ("Llama", {"rope_parameters": YARN | {
        "attention_factor": 1.5, "truncate": False, "beta_fast": 8.0,
        "original_max_position_embeddings": 16}}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of memory here, so that measuring what a process takes can be spared."""
    monkeypatch.setattr(loading, "runtime_bytes", lambda *_: 0)


def built(config: Any, seed: int = 0) -> Any:
    """A random model with weights large enough for the logits to differ."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(p + 0.1 * noise if "norm" in name else 0.2 * noise)
    return model


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([tiny.TOKENS])).logits[0].float().numpy())


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tiny.tokenizer().to_str())
    return folder


def ours(path: Path) -> np.ndarray:
    """All logits: as a span, and the same token by token."""
    with outsize.load(str(path), encoding="fp32", quiet=True) as model:
        span, steps = logits(model, [40]), logits(model, [30, *[1] * 10])
    np.testing.assert_allclose(steps, span, atol=TOLERANCE, rtol=0)
    return span


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    family, more = CASES[name]
    seed = list(CASES).index(name)
    model = built(getattr(transformers, f"{family}Config")(**SIZES | more), seed)
    np.testing.assert_allclose(
        ours(saved(model, tmp_path / "m")), theirs(model), atol=TOLERANCE, rtol=0
    )


# What each size of Gemma 3 states of its heads on the hub; the rest is the class's.
@pytest.mark.parametrize(
    "heads",
    [
        {},
        {"num_attention_heads": 8, "num_key_value_heads": 4},
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "query_pre_attn_scalar": 24},
    ],
    ids=["4b", "12b", "27b"],
)  # fmt: skip
def test_gemma3_as_on_the_hub(heads: dict[str, Any], tmp_path: Path) -> None:
    text = heads | {
        "model_type": "gemma3_text", "vocab_size": tiny.VOCAB, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 6, "sliding_window": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }  # fmt: skip
    outer = {"model_type": "gemma3", "text_config": text, "boi_token_index": 255_999}
    config = transformers.Gemma3Config.from_dict(json.loads(json.dumps(outer))).text_config
    model = built(config, 100 + len(heads))
    path = saved(model, tmp_path / "m")
    renamed = {f"language_model.{k}": v.clone() for k, v in model.state_dict().items()
               if not k.startswith("lm_head")}  # fmt: skip
    save_file(renamed, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(outer))
    np.testing.assert_allclose(ours(path), theirs(model), atol=TOLERANCE, rtol=0)


def test_a_head_beside_a_tied_embedding(tmp_path: Path) -> None:
    """transformers ties only what a file lacks."""
    path = saved(built(transformers.LlamaConfig(**SIZES), 200), tmp_path / "m")
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    np.testing.assert_allclose(ours(path), theirs(model), atol=TOLERANCE, rtol=0)
