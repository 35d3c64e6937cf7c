"""Keys of the families' GGUF files: each one that is read matters or is refused, unknown ones are refused by
name, and no damaged value gives anything but our errors. So with configs of Hugging Face."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from outsize.checkpoint import gguf
from outsize.checkpoint.checkpoint import Checkpoint
from outsize.checkpoint.opening import open_checkpoint
from outsize.errors import CheckpointError, OutsizeError, UnsupportedError
from outsize.family.config import FEW_KEYS
from outsize.family.find import families, recipe
from outsize.model_config import Description
from outsize.pack.layout import plan
from tests.golden import converted, tiny
from tests.laws.test_config_keys import ODD, family_of

NEW = tuple(converted.ARCHITECTURES)


def read_by(family: str) -> tuple[str, ...]:
    """What the family that its files name reads beside the usual keys."""
    named = {"glm4_moe_lite": "deepseek_v3"}.get(family, family)
    return getattr(family_of(named), "GGUF_READ", ())


READ = [(family, key) for family in NEW for key in sorted(read_by(family))]
# Another value of a key that is read.
CHANGES: dict[str, object] = {
    "shared_expert_intermediate_size": 64, "n_shared_experts": 2, "n_group": 2, "topk_group": 3,
    "routed_scaling_factor": 3.0, "norm_topk_prob": False, "scoring_func": 1, "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 1, "kv_lora_rank": 64, "q_lora_rank": 32, "qk_head_dim": 64,
    "v_head_dim": 32, "value_length": 8, "rotary_dim": 8, "yarn_log_multiplier": 0.5,
    "temperature_scale": 0.3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    "logits_scaling": 3.0, "embedding_multiplier": 3.0, "residual_multiplier": 3.0,
    "attention_multiplier": 3.0, "interleave_moe_layer_step": 2, "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 32, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_values": 48,
    "full_attention_interval": 3, "conv_L_cache": 4, "layer_norm_epsilon": 1e-3,
    "swa_head_dim": 16, "swa_value_length": 16, "swa_rotary_dim": 16, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def gguf_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    folder: Path = tmp_path_factory.mktemp("converted")

    @cache
    def load(family: str) -> Checkpoint:
        return gguf.load(converted.write(folder / f"{family}.gguf", family))

    return load


def described(checkpoint: Checkpoint, config: dict[str, object]) -> Description | str:
    try:
        return recipe(replace(checkpoint, config=config)).description
    except OutsizeError as e:
        return type(e).__name__


@pytest.mark.parametrize(("family", "key"), READ)
def test_a_key_that_is_read_matters_or_is_refused(
    family: str, key: str, gguf_of: Callable[[str], Checkpoint]
) -> None:
    checkpoint = gguf_of(family)
    full = f"{checkpoint.architecture}.{FEW_KEYS[key]}"
    config: dict[str, object] = {**checkpoint.config}
    if key == "topk_group":
        config |= {f"{checkpoint.architecture}.expert_group_count": 4}
        config |= {f"{checkpoint.architecture}.expert_group_used_count": 2}
    if family == "glm4_moe_lite" and key == "yarn_log_multiplier":  # of a rope that is not scaled
        return
    base = described(checkpoint, config)
    assert not isinstance(base, str)
    assert described(checkpoint, config | {full: CHANGES[key]}) != base


@pytest.mark.parametrize("family", NEW)
def test_other_keys_are_refused_by_name(family: str, gguf_of: Callable[[str], Checkpoint]) -> None:
    checkpoint = gguf_of(family)
    known = set(read_by(family))
    for key in sorted(set(FEW_KEYS) - known - {"value_length", "rotary_dim", "scoring_func"}):
        full = f"{checkpoint.architecture}.{FEW_KEYS[key]}"
        if family.startswith("olmo"):
            assert full not in checkpoint.config
        with pytest.raises(UnsupportedError, match=FEW_KEYS[key]):
            recipe(replace(checkpoint, config={**checkpoint.config, full: 7}))


@pytest.mark.parametrize("family", NEW)
def test_every_tensor_of_a_gguf_is_used(family: str, gguf_of: Callable[[str], Checkpoint]) -> None:
    checkpoint = gguf_of(family)
    plan(checkpoint, recipe(checkpoint), "bf16", False)
    for name in [n for n in checkpoint.tensors if n.startswith("blk.1.")]:
        rest = {k: t for k, t in checkpoint.tensors.items() if k != name}
        less = replace(checkpoint, tensors=rest)
        if name.endswith((".bias", "_norm.weight")) and family == "glm4_moe":
            continue  # a file's tensors tell whether there are any
        if name.endswith("attn_v.weight") and family == "gemma4":
            continue  # keys' map makes values, where there is none of their own
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            plan(less, recipe(less), "bf16", False)
    tensor = replace(
        checkpoint.tensors["blk.1.attn_output.weight"], name="blk.1.attn_strange.weight"
    )
    more = replace(checkpoint, tensors={**checkpoint.tensors, tensor.name: tensor})
    with pytest.raises(UnsupportedError, match="attn_strange"):
        plan(more, recipe(more), "bf16", False)


def test_layers_of_further_tokens_are_left_out(gguf_of: Callable[[str], Checkpoint]) -> None:
    """A GGUF counts them among its layers; a folder has their tensors behind the last layer's."""
    checkpoint = gguf_of("glm4_moe")
    config = {**checkpoint.config, "glm4moe.nextn_predict_layers": 1}
    made = replace(checkpoint, config={**config, "glm4moe.block_count": tiny.LAYERS + 1})
    extra = replace(
        checkpoint.tensors["output_norm.weight"], name=f"blk.{tiny.LAYERS}.nextn.enorm.weight"
    )
    made = replace(made, tensors={**checkpoint.tensors, extra.name: extra})
    assert recipe(made).description == recipe(checkpoint).description
    plan(made, recipe(made), "bf16", False)
    with pytest.raises(UnsupportedError, match="nextn"):
        plan(replace(made, config=checkpoint.config), recipe(checkpoint), "bf16", False)


def mutant(values: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """With one or two values damaged, somewhere."""
    out = dict(values)
    for _ in range(chance.randint(1, 2)):
        key = chance.choice(sorted(out))
        old = out[key]
        odd = [*ODD, float("nan"), 2**40, -7, 0.001, [0.5] * 3, ["dense"] * 3, [True, 0, 1]]
        near = [old * 2, old - 1, old / 3] if isinstance(old, int | float) else []
        out[key] = chance.choice([*odd, *near])
    return out


@pytest.mark.parametrize("family", NEW)
def test_damaged_values_give_our_errors(
    family: str, gguf_of: Callable[[str], Checkpoint], folder_of: Callable[[str], Path]
) -> None:
    """2,000 in all, half of either format: a description that holds its bounds, or one of our errors."""
    chance, known = random.Random(family), family_of(family)
    folder, file = open_checkpoint(folder_of(family)), gguf_of(family)
    keys = {
        k: v for k, v in tiny.config(family).items() if k in known.DEFAULTS or k in tiny.SIGMOID
    }
    theirs = {k: v for k, v in file.config.items() if k.startswith(f"{file.architecture}.")}
    for _ in range(80):
        with suppress(OutsizeError):
            recipe(replace(folder, config={**folder.config, **mutant(keys, chance)}))
        with suppress(OutsizeError):
            recipe(replace(file, config={**file.config, **mutant(theirs, chance)}))


def test_a_latent_of_old_files_and_of_v2_is_refused(gguf_of: Callable[[str], Checkpoint]) -> None:
    checkpoint = gguf_of("deepseek_v3")
    plain = {k: t for k, t in checkpoint.tensors.items() if "exp_probs_b" not in k}
    for key, word in (
        ("attention.key_length_mla", "April 2025"),
        ("expert_gating_func", "DeepSeek V2"),
    ):
        config = {k: v for k, v in checkpoint.config.items() if k != f"deepseek2.{key}"}
        with pytest.raises(UnsupportedError, match=word):
            recipe(replace(checkpoint, config=config, tensors=plain))


def test_a_file_that_does_not_say_how_experts_are_weighed(
    gguf_of: Callable[[str], Checkpoint],
) -> None:
    """GLM 4.7 Flash as it was converted until 2026-01-21 (llama.cpp#18980): a bias for choosing is of
    sigmoids."""
    checkpoint = gguf_of("glm4_moe_lite")
    config = {k: v for k, v in checkpoint.config.items() if "expert_gating_func" not in k}
    made = recipe(replace(checkpoint, config=config)).description
    assert made == recipe(checkpoint).description
    assert made.mixture is not None
    assert made.mixture.score == "sigmoid"


def test_every_new_family_is_held() -> None:
    assert {*NEW, "opt"} == set(tiny.STORED) <= set(families())  # llama.cpp has no OPT
