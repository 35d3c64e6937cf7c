"""GGUF's tensor names of every family, against the `gguf` package's own tables: what llama.cpp's converter
makes of a Hugging Face tensor is what our recipe calls the same tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest

from outsize.checkpoint.checkpoint import Checkpoint, Tensor, TokenizerSpec
from outsize.checkpoint.ggml import BY_NAME
from outsize.checkpoint.opening import open_checkpoint
from outsize.family.find import families, recipe
from tests.golden import tiny
from tests.golden.converted import ARCHITECTURES as NEW
from tests.golden.converted import metadata

# Our family -> the architecture that llama.cpp's converter gives its models.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma3": "gemma3", "olmoe": "olmoe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss",
    **NEW,
}  # fmt: skip
WITHOUT = {"afm", "memoryllm", "opt"}  # no GGUF is made of them
BY_NUMBERS = {"gemma4"}  # of which a recipe reads a tensor: test_golden.py holds its names


def gguf_names(family: str, tensors: tuple[str, ...]) -> dict[str, str]:
    """What our recipe calls the tensors of a GGUF that has these."""
    architecture = ARCHITECTURES[family]
    keys: dict[str, object] = {
        "block_count": tiny.LAYERS, "context_length": 512, "embedding_length": tiny.WIDTH,
        "feed_forward_length": tiny.FFN, "attention.head_count": tiny.HEADS,
        "attention.head_count_kv": tiny.KV_HEADS, "attention.key_length": tiny.HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4, "attention.sliding_window": 8,
    }  # fmt: skip
    if family in NEW:
        keys = metadata(family)
    elif family in tiny.MIXTURES:
        keys |= {"expert_count": tiny.EXPERTS, "expert_used_count": 2}
        keys |= {"expert_feed_forward_length": tiny.FFN} if family != "mixtral" else {}
    kind, shape = BY_NAME["F32"], (tiny.VOCAB, tiny.WIDTH)
    made = {name: Tensor(name, kind, shape, Path("x"), 0, 0) for name in tensors}
    head = {f"{architecture}.{key}": value for key, value in keys.items()}
    return dict(recipe(Checkpoint("gguf", architecture, head, made, TokenizerSpec(), ())).names)


def converted(family: str, name: str) -> Iterator[str]:
    """Hugging Face's name as the converter looks it up: of an expert's map that of all experts, as stacked;
    gpt-oss' gate and up apart, and its sinks as weights."""
    name = re.sub(r"\.experts\.\{e\}\.", ".experts.", name).replace("{i}", "0")
    if family == "mixtral":  # the converter gives Mixtral's stacks names of Mistral's own layout
        name = name.replace(
            "model.layers.0.block_sparse_moe.experts", "layers.0.feed_forward.experts"
        )
    if family == "minimax_m2":
        name = name.replace(
            "model.layers.0.block_sparse_moe.experts", "layers.0.feed_forward.experts"
        )
    name = re.sub(r"\.sinks$", ".sinks.weight", name)
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    name = name.replace("linear_attn.dt_bias", "linear_attn.dt_proj.bias")
    if "input_linear" in name:  # cut by the converter, which writes the halves under its own names
        name = name.replace("block_sparse_moe.input_linear", "mlp.experts.gate_up_proj")
    if "kv_b_proj" in name:
        yield from (name.replace("kv_b", half) for half in ("k_b", "v_b"))
        return
    for plain in ("gate_up_proj", "down_proj"):
        bias, full = f"experts.{plain}_bias", f"experts.{plain}"
        name = name.replace(bias, f"experts.{plain}.bias")
        name = name + ".weight" if name.endswith(full) else name
    if "experts.gate_up_proj" in name:
        yield from (name.replace("gate_up_proj", f"{half}_proj") for half in ("gate", "up"))
        return
    yield name


@pytest.mark.parametrize("family", sorted(set(families()) - WITHOUT - BY_NUMBERS))
def test_names_are_those_of_the_gguf_package(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.write_folder(tmp_path / family, family))
    theirs = recipe(checkpoint).names
    by_name = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(by_name[ARCHITECTURES[family]], tiny.LAYERS)
    found: dict[str, list[str]] = {}
    for ours, foreign in theirs.items():
        real = foreign.replace("{i}", "0").replace("{e}", "0")
        if real in checkpoint.tensors:
            looked_up = [
                table.get_name(n, (".weight", ".bias")) for n in converted(family, foreign)
            ]
            assert None not in looked_up, f"{foreign} is not in the package's table"
            found[ours] = [str(name) for name in looked_up]
    assert len(found) >= 9
    names = gguf_names(family, tuple(n for made in found.values() for n in made))
    for ours, expected in found.items():
        halves = ("k_b", "v_b") if ours == "kv_b" else ("gate", "up")
        roles = [ours.replace("kv_b", h).replace("gate_up", h) for h in halves]
        roles = [ours] if len(expected) == 1 else roles
        assert [names[r].replace("{i}", "0") for r in roles] == expected, ours


def test_every_family_is_held() -> None:
    assert set(families()) == ARCHITECTURES.keys() | WITHOUT
