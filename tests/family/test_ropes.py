"""Rotary angles of every kind of rope equal those of transformers' modules, inside and beyond the original
context."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from outsize.family.config import Config
from outsize.family.rope import context, rope
from outsize.model.layers import cos_sin, query_growth
from outsize.model_config import Rope

transformers = pytest.importorskip("transformers", minversion="5.20")

POSITIONS = [0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 100, 255, 511, 700]
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 64, "vocab_size": 64,
    "num_hidden_layers": 2, "pad_token_id": 0,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
    "short_factor": [1.0 + 0.1 * i for i in range(16)], "long_factor": [1.0 + 2.0 * i for i in range(16)],
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
THREE_QUARTERS = {**LONG, "partial_rotary_factor": 0.75}
THREE_QUARTERS |= {k: LONG[k][:12] for k in ("short_factor", "long_factor")}  # type: ignore[index]
# The class of a config, its module in transformers, what the config says of positions.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": ("Llama", "llama", {"rope_theta": 1e4}),
    "linear": ("Llama", "llama", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "llama3": ("Llama", "llama", LLAMA3),
    "yarn": ("Llama", "llama", YARN),
    "yarn_scales": ("Llama", "llama", YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}),
    "yarn_factor": ("Llama", "llama", YARN | {"attention_factor": 1.3, "truncate": False}),
    "yarn_turns": ("Llama", "llama", YARN | {"beta_fast": 8.0, "beta_slow": 2.0}),
    "partial": ("Glm4Moe", "glm4_moe", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "partial_yarn": ("Glm4Moe", "glm4_moe", YARN | {"partial_rotary_factor": 0.5}),
    "partial_linear": ("Glm4Moe", "glm4_moe", {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.25}),
    "long": ("Phi3", "phi3", LONG),
    "long_partial": ("Phi3", "phi3", THREE_QUARTERS),
    "long_factor": ("Phi3", "phi3", LONG | {"attention_factor": 1.4}),
    "dynamic": ("Llama", "llama", {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}),
}  # fmt: skip


def ours(family: str, values: dict[str, Any], kind: str = "") -> Rope:
    extras = {"partial_rotary_factor": None} if family in ("phi3", "glm4_moe") else {}
    config = Config("safetensors", family, {**SIZES, **extras, **values}, frozenset(), 64)
    return rope(config, kind)


def theirs(config: Any, module: str, name: str, positions: list[int], *kind: str) -> torch.Tensor:
    """(T, pairs) complex: the first half of what the module gives for both halves."""
    made = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    ids = torch.tensor([positions])
    cos, sin = made(config)(torch.zeros(1), ids, *kind)
    pairs = cos.shape[-1] // 2
    return torch.complex(cos[..., :pairs], sin[..., :pairs]).view(-1, pairs)


def check(found: Rope, expected: torch.Tensor, positions: list[int]) -> None:
    """Angles of pairs that rotate; the others are at rest."""
    angles = cos_sin(found, 32, torch.tensor(positions))[:, 0]
    pairs = expected.shape[1]
    torch.testing.assert_close(angles[:, :pairs], expected, atol=2e-4, rtol=0)
    assert (angles[:, pairs:] == 1).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_angles_are_those_of_transformers(name: str) -> None:
    class_name, module, table = CASES[name]
    own = {"original_max_position_embeddings": 32} if name.startswith("long") else {}
    config = getattr(transformers, f"{class_name}Config")(
        **SIZES, **own, rope_parameters=dict(table)
    )
    found = ours(module, own | {"rope_parameters": table})
    rotary = f"{class_name}RotaryEmbedding"
    if name.startswith("long"):  # a sequence within the original context, and a longer one
        for last in (31, 60):
            some = [p for p in POSITIONS if p < last] + [last]
            check(found.for_context(last + 1), theirs(config, module, rotary, some), some)
        return
    if (
        name == "dynamic"
    ):  # transformers' base is that of the longest sequence so far: token by token
        for p in POSITIONS:
            check(found, theirs(config, module, rotary, [p]), [p])
        return
    check(found, theirs(config, module, rotary, POSITIONS), POSITIONS)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize(("class_name", "module"), [("Gemma3Text", "gemma3"), ("Olmo3", "olmo3")])
def test_bases_of_layers(kind: str, class_name: str, module: str) -> None:
    tables = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": YARN | {"rope_theta": 1e6},
    }
    kinds = list(tables)
    values = {**SIZES, "head_dim": 32, "rope_parameters": tables, "layer_types": kinds}
    config = getattr(transformers, f"{class_name}Config")(**values)
    name = f"{class_name.removesuffix('Text')}RotaryEmbedding"
    expected = theirs(config, module, name, POSITIONS, kind)
    check(ours(module, values, kind), expected, POSITIONS)


def test_sections_of_multimodal_ropes_say_nothing_of_texts() -> None:
    """A token of a text has one position in all three."""
    sections = {"type": "mrope", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    config = transformers.Qwen2VLTextConfig(**SIZES, rope_parameters=dict(sections))
    module = importlib.import_module("transformers.models.qwen2_vl.modeling_qwen2_vl")
    ids = torch.tensor(POSITIONS).expand(3, 1, -1)
    cos, sin = module.Qwen2VLRotaryEmbedding(config)(torch.zeros(1), ids)
    each = torch.complex(cos, sin).view(-1, len(POSITIONS), 32)[..., :16]
    for one in each:
        check(ours("qwen2", {"rope_parameters": sections}), one, POSITIONS)


def test_queries_grow_as_transformers_let_them() -> None:
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    table = {**YARN, "llama_4_scaling_beta": 0.1}
    found = ours("ministral3", {"llama_4_scaling_beta": None, "rope_parameters": table})
    expected = get_llama_4_attn_scale(torch.tensor([POSITIONS]), 0.1, 16).view(-1, 1)
    made = query_growth(found, POSITIONS)
    assert made is not None
    torch.testing.assert_close(made, expected)
    assert query_growth(found, [0, 7, 15]) is None
    assert query_growth(ours("llama", {}), POSITIONS) is None


def test_contexts() -> None:
    def of(table: dict[str, Any]) -> int:
        return context(
            Config("safetensors", "llama", {**SIZES, "rope_parameters": table}, frozenset(), 64)
        )

    assert of({"rope_type": "dynamic", "factor": 3.0}) == 192
    assert of(YARN | {"factor": 8.0}) == 128
    assert of({**LONG, "factor": 2.0}) == 64


SECTIONS = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
HYBRID = {
    "plain": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    "half": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
    "yarn": YARN | {"partial_rotary_factor": 0.25},
    "whole_yarn": YARN | {"partial_rotary_factor": 1.0, "attention_factor": 1.2},
}


@pytest.mark.parametrize("name", HYBRID)
@pytest.mark.parametrize(
    ("class_name", "module"),
    [("Qwen3Next", "qwen3_next"), ("Qwen3_5Text", "qwen3_5"), ("Qwen3_5MoeText", "qwen3_5_moe")],
)
@pytest.mark.filterwarnings("ignore")
def test_ropes_of_hybrids(class_name: str, module: str, name: str) -> None:
    """A quarter of a head rotates by default; in texts, sections say nothing."""
    table = HYBRID[name] | ({} if module == "qwen3_next" else SECTIONS)
    values = {**SIZES, "head_dim": 32, "rope_parameters": table}
    config = getattr(transformers, f"{class_name}Config")(
        **{**values, "rope_parameters": {**table}}
    )
    expected = theirs(config, module, f"{class_name}RotaryEmbedding", POSITIONS)
    check(ours(module, {"partial_rotary_factor": 0.25, **values}), expected, POSITIONS)
