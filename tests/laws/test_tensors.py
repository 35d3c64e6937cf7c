"""Every tensor of a checkpoint is used or a known spare, or the model is refused by its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import outsize
from outsize.checkpoint import gguf
from outsize.checkpoint.checkpoint import Checkpoint
from outsize.checkpoint.opening import open_checkpoint
from outsize.errors import CheckpointError, UnsupportedError
from outsize.family.find import families, recipe
from outsize.pack.layout import plan
from tests.golden import tiny
from tests.golden.test_golden import logits, write_gguf

Folders = Callable[[str], Path]
SPARE = "model.layers.0.self_attn.rotary_emb.inv_freq"
IMAGES = (
    "vision_tower.vision_model.post_layernorm.weight",
    "multi_modal_projector.mm_soft_emb_norm.weight",
)


def planned(checkpoint: Checkpoint) -> list[object]:
    return [t.header for t in plan(checkpoint, recipe(checkpoint), "bf16", False)]


def with_tensor(checkpoint: Checkpoint, name: str) -> Checkpoint:
    made = replace(next(iter(checkpoint.tensors.values())), name=name)
    return replace(checkpoint, tensors={**checkpoint.tensors, name: made})


@pytest.mark.parametrize("family", families())
def test_an_unknown_tensor_is_refused_by_name(family: str, folder_of: Folders) -> None:
    checkpoint = open_checkpoint(folder_of(family))
    for name in (
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        f"model.layers.{tiny.LAYERS}.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "score.weight",
    ):
        if name in checkpoint.tensors:
            continue
        with pytest.raises(UnsupportedError, match=name):
            planned(with_tensor(checkpoint, name))


@pytest.mark.parametrize("family", families())
def test_biases_that_the_config_does_not_ask_for_are_refused(
    family: str, folder_of: Folders
) -> None:
    checkpoint = open_checkpoint(folder_of(family))
    for part in ("self_attn.q_proj.bias", "self_attn.o_proj.bias", "mlp.down_proj.bias"):
        name = f"model.layers.1.{part}"
        if name not in checkpoint.tensors:
            with pytest.raises(UnsupportedError, match=name):
                planned(with_tensor(checkpoint, name))


@pytest.mark.parametrize(
    "name", ["qweight", "scales", "qzeros", "weight_packed", "weight_scale", "SCB", "weight.absmax"]
)
def test_what_quantizers_leave_is_named(name: str, folder_of: Folders) -> None:
    name = f"model.layers.0.self_attn.q_proj.{name}"
    with pytest.raises(UnsupportedError, match=f"{name}.*quantized checkpoint"):
        planned(with_tensor(open_checkpoint(folder_of("llama")), name))


@pytest.mark.parametrize("family", families())
def test_spares_change_nothing(family: str, folder_of: Folders) -> None:
    checkpoint = open_checkpoint(folder_of(family))
    assert planned(with_tensor(checkpoint, SPARE)) == planned(checkpoint)
    for name in IMAGES:
        if family in ("gemma3", "gemma4", "ministral3"):
            assert planned(with_tensor(checkpoint, name)) == planned(checkpoint)
        else:
            with pytest.raises(UnsupportedError, match=name):
                planned(with_tensor(checkpoint, name))


@pytest.mark.parametrize("family", families())
def test_a_tensor_that_is_not_there_is_named(family: str, folder_of: Folders) -> None:
    checkpoint = open_checkpoint(folder_of(family))
    for name in checkpoint.tensors:
        if family in tiny.STORED and re.search(r"layers\.[02]\.|experts\.[1-7]\.", name):
            continue  # one layer, and of its experts one, says it of all
        rest = {k: t for k, t in checkpoint.tensors.items() if k != name}
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            planned(replace(checkpoint, tensors=rest))


def test_another_layout_is_not_called_incomplete(folder_of: Folders) -> None:
    checkpoint = open_checkpoint(folder_of("llama"))
    old = "model.layers.0.self_attn.q_proj.weight"
    rest = {k: t for k, t in checkpoint.tensors.items() if k != old}
    fused = with_tensor(
        replace(checkpoint, tensors=rest), "model.layers.0.self_attn.qkv_proj.weight"
    )
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight.*qkv_proj\.weight.*layout"):
        planned(fused)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf_tensors(family: str, tmp_path: Path) -> None:
    checkpoint = gguf.load(write_gguf(tmp_path / "tiny.gguf", family))
    spare = with_tensor(checkpoint, "blk.0.attn_rot_embd.weight")
    assert planned(spare) == planned(checkpoint)
    for name in ("blk.0.ffn_gate_shexp.weight", "blk.9.attn_q.weight", "rope_factors_long.weight"):
        with pytest.raises(UnsupportedError, match=name):
            planned(with_tensor(checkpoint, name))
    for name in checkpoint.tensors.keys() - {"output.weight", "rope_freqs.weight"}:
        rest = {k: t for k, t in checkpoint.tensors.items() if k != name}
        with pytest.raises(CheckpointError, match=name):
            planned(replace(checkpoint, tensors=rest))


def changed(folder: Path, target: Path, family: str, **changes: np.ndarray | None) -> Path:
    """The tiny model with some tensors more, or fewer (None)."""
    tiny.write_folder(target, family)
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {k: v for k, v in tensors.items() if v is not None}
    save_file(kept, target / "model.safetensors")
    return target


def test_a_spare_leaves_the_logits(folder_of: Folders, tmp_path: Path) -> None:
    folder = folder_of("qwen3")
    path = changed(folder, tmp_path / "m", "qwen3", **{SPARE: np.ones(16, np.float32)})
    with (
        outsize.load(str(folder), encoding="fp32", quiet=True) as one,
        outsize.load(str(path), encoding="fp32", quiet=True) as two,
    ):
        assert np.array_equal(logits(one, [40]), logits(two, [40]))


def test_a_head_of_its_own_is_used_though_the_config_ties(
    folder_of: Folders, tmp_path: Path
) -> None:
    """As transformers does: it ties only what the file does not have."""
    head = np.random.default_rng(3).standard_normal((tiny.VOCAB, tiny.WIDTH)).astype(np.float32)
    path = changed(folder_of("qwen2"), tmp_path / "m", "qwen2", **{"lm_head.weight": head})
    assert not recipe(open_checkpoint(path)).description.tied
    assert recipe(open_checkpoint(folder_of("qwen2"))).description.tied
