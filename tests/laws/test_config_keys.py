"""Every key of a config is heeded, neutral or refused by name; one left out is what the class says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as writer
import numpy as np
import pytest

from outsize import registry
from outsize.checkpoint import gguf
from outsize.checkpoint.checkpoint import Checkpoint
from outsize.checkpoint.opening import open_checkpoint
from outsize.errors import CheckpointError, OutsizeError, UnsupportedError
from outsize.family import keys
from outsize.family.find import families, recipe
from outsize.model_config import Description
from tests.golden import tiny
from tests.golden.test_golden import write_gguf

Folders = Callable[[str], Path]
# transformers' classes; AFM's and MemoryLLM's architectures have none.
CLASSES = {
    "llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config",
    "gemma3": "Gemma3TextConfig", "olmoe": "OlmoeConfig", "mixtral": "MixtralConfig",
    "qwen3_moe": "Qwen3MoeConfig", "gpt_oss": "GptOssConfig", "qwen2_moe": "Qwen2MoeConfig",
    "phi3": "Phi3Config", "granite": "GraniteConfig", "granitemoe": "GraniteMoeConfig",
    "olmo2": "Olmo2Config", "olmo3": "Olmo3Config", "smollm3": "SmolLM3Config",
    "ministral3": "Ministral3Config", "gemma2": "Gemma2Config", "minimax_m2": "MiniMaxM2Config",
    "glm4_moe": "Glm4MoeConfig", "deepseek_v3": "DeepseekV3Config",
    "glm4_moe_lite": "Glm4MoeLiteConfig", "llama4": "Llama4TextConfig",
    "qwen3_next": "Qwen3NextConfig", "qwen3_5": "Qwen3_5TextConfig",
    "qwen3_5_moe": "Qwen3_5MoeTextConfig", "lfm2": "Lfm2Config", "opt": "OPTConfig",
    "falcon": "FalconConfig", "gemma4": "Gemma4TextConfig",
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
KINDS = ["full_attention", "full_attention", "sliding_attention"]
# Another value of each key that is heeded, and what else the config must say for it to matter.
CHANGES: dict[str, tuple[object, dict[str, object]]] = {
    "hidden_size": (128, {}), "num_hidden_layers": (2, {}),
    "intermediate_size": (192, {"block_ff_dim": None}),
    "num_attention_heads": (2, {}), "num_key_value_heads": (1, {}), "head_dim": (8, {}),
    "max_position_embeddings": (2048, {}), "rms_norm_eps": (1e-4, {}), "hidden_act": ("gelu", {}),
    "hidden_activation": ("silu", {}), "rope_theta": (5e4, {"rope_scaling": None, "rope_parameters": None}),
    "rope_local_base_freq": (5e3, {}),
    "rope_scaling": (LINEAR, {}), "rope_parameters": (LINEAR, {"rope_scaling": None}),
    "original_max_position_embeddings": (4096, {"rope_scaling": YARN}),
    "vocab_size": (300, {}), "attention_bias": (None, {}), "mlp_bias": (None, {}),
    "query_pre_attn_scalar": (99, {}), "sliding_window": (5, WINDOW),
    "sliding_window_pattern": (2, {"layer_types": None}),
    "use_sliding_window": (False, WINDOW), "max_window_layers": (0, WINDOW),
    "layer_types": (KINDS, WINDOW), "num_local_experts": (16, {}), "num_experts_per_tok": (1, {}),
    "moe_intermediate_size": (32, {}), "norm_topk_prob": (None, {}),
    "shared_expert_intermediate_size": (96, {}),
    "partial_rotary_factor": (0.125, {"rotary_dim": None, "rope_parameters": None}),
    "rotary_dim": (8, {}), "embedding_multiplier": (3.0, {}), "logits_scaling": (3.0, {}),
    "residual_multiplier": (3.0, {}), "attention_multiplier": (3.0, {}),
    "no_rope_layers": ([1, 1, 0], {}), "no_rope_layer_interval": (3, {"no_rope_layers": None}),
    "llama_4_scaling_beta": (0.5, {"rope_parameters": YARN}),
    "final_logit_softcapping": (None, {}), "attn_logit_softcapping": (None, {}),
    "use_qk_norm": (None, {}), "n_shared_experts": (2, {}), "n_group": (2, {}),
    "topk_group": (3, {"n_group": 4, "num_experts_per_tok": 1}), "first_k_dense_replace": (2, {}),
    "routed_scaling_factor": (3.0, {}), "kv_lora_rank": (64, {}), "q_lora_rank": (32, {}),
    "qk_rope_head_dim": (32, {}), "qk_nope_head_dim": (64, {}), "v_head_dim": (32, {}),
    "mlp_layer_types": (["dense", "dense", "sparse"], {}),
    "intermediate_size_mlp": (192, {}), "moe_layers": ([1], {}), "attn_temperature_tuning": (None, {}),
    "interleave_moe_layer_step": (2, {"moe_layers": None}), "attention_chunk_size": (5, {}),
    "linear_conv_kernel_dim": (3, {}), "linear_key_head_dim": (32, {}), "linear_value_head_dim": (32, {}),
    "linear_num_key_heads": (4, {}), "linear_num_value_heads": (8, {}),
    "full_attention_interval": (3, {"layer_types": None}),
    "norm_eps": (1e-4, {}), "tie_embedding": (None, {}), "block_ff_dim": (288, {}),
    "block_multiple_of": (64, {}), "block_ffn_dim_multiplier": (3.0, {}),
    "block_auto_adjust_ff_dim": (None, {}), "conv_L_cache": (4, {}),
    "full_attn_idxs": ([0, 1], {"layer_types": None}),
    "floor_scale": (9, {}), "attn_scale": (0.4, {}), "ffn_dim": (192, {}), "ffn_hidden_size": (192, {}),
    "activation_function": ("gelu", {}), "activation": ("relu", {}), "enable_bias": (None, {}),
    "vocab_size_per_layer_input": (300, {}), "hidden_size_per_layer_input": (64, {}),
    "num_kv_shared_layers": (0, {}), "enable_moe_block": (None, {}), "use_double_wide_mlp": (None, {}),
    "top_k_experts": (1, {}), "global_head_dim": (64, {}),
    "num_global_key_value_heads": (1, {"attention_k_eq_v": True}),
    "per_layer_config": ({"1": {"head_dim": 64}, "2": {"head_dim": 64}}, {}),
    "word_embed_proj_dim": (32, {}), "layer_norm_epsilon": (1e-3, {}), "dense_intermediate_size": (32, {}),
}  # fmt: skip
EXPERTS: dict[str, object] = {  # of Gemma 4, where there are some
    "enable_moe_block": True, "num_local_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64,
    "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False,
}  # fmt: skip
HARMLESS = {
    "unsloth_version": "2026.1", "use_mrope": False, "is_llama_config": True, "rope_interleaved": False,
    "torch_dtype": "bfloat16", "neftune_noise_alpha": 5, "pretraining_tp": 2, "logits_scaling": 1.0,
    "auto_map": {"AutoModel": "x"}, "cache_implementation": "hybrid", "temperature": 0.6,
}  # fmt: skip
STRANGE = {
    "logits_scaling": 8.0, "use_qk_norm": True, "residual_multiplier": 0.2, "attn_logit_softcapping": 50.0,
    "num_shared_experts": 2, "final_logit_softcapping": 30.0, "partial_rotary_factor": 0.5,
    "is_encoder_decoder": True, "rope_interleaved": True, "bias": True, "embedding_multiplier": 12,
    "clip_qkv": 8.0,
}  # fmt: skip


def family_of(family: str) -> Any:
    import outsize.family as package

    return registry.module(package, family, "architecture", families())


def fixed_of(family: str) -> dict[str, tuple[object, ...]]:
    """The keys that a family knows in some values only."""
    known = family_of(family)
    others = {k: v for k, v in keys.FIXED.items() if k not in known.DEFAULTS}
    return others | getattr(known, "FIXED", {})


def described(checkpoint: Checkpoint, config: dict[str, object]) -> Description:
    return recipe(replace(checkpoint, config=deepcopy(config))).description


def outcome(checkpoint: Checkpoint, config: dict[str, object]) -> Description | str:
    """The description, or that it was refused."""
    try:
        return described(checkpoint, config)
    except OutsizeError as e:
        return type(e).__name__


def stated(family: str, config: dict[str, object]) -> dict[str, object]:
    """All that transformers' class says of a config."""
    transformers = pytest.importorskip("transformers", minversion="5.20")
    made = getattr(transformers, CLASSES[family])(**deepcopy(config)).to_dict()
    return {**made, "vocab_size": tiny.VOCAB, "model_type": family}


REFUSED = "refused"


def as_the_class(checkpoint: Checkpoint, family: str, config: dict[str, object]) -> object:
    from huggingface_hub.errors import StrictDataclassError

    try:
        full = stated(family, config)
    except (StrictDataclassError, IndexError):  # transformers refuses it, too
        return REFUSED
    return outcome(checkpoint, full)


def test_every_family_has_a_class() -> None:
    assert set(CLASSES) | {"afm", "memoryllm"} == set(families())


@pytest.mark.parametrize("family", CLASSES)
def test_what_a_config_leaves_out_is_what_the_class_says(family: str, folder_of: Folders) -> None:
    checkpoint, config = open_checkpoint(folder_of(family)), tiny.config(family)
    for key in config:
        rest = {k: v for k, v in config.items() if k not in (key, "model_type")}
        ours, theirs = outcome(checkpoint, rest), as_the_class(checkpoint, family, rest)
        assert ours == theirs or (theirs == REFUSED and isinstance(ours, str)), key
    empty = outcome(checkpoint, {})
    assert empty == outcome(checkpoint, stated(family, {}))
    if family == "gemma3":
        assert outcome(checkpoint, {"text_config": {}}) == empty


@pytest.mark.parametrize("family", CLASSES)
def test_no_key_of_the_class_is_unclassified(family: str) -> None:
    made, known = stated(family, {}), family_of(family)
    count = {"num_experts", "n_routed_experts"}  # other names of num_local_experts
    assert made.keys() <= {
        *known.DEFAULTS,
        *getattr(known, "FIXED", {}),
        *keys.FIXED,
        *keys.NEUTRAL,
        *count,
    }
    for key in keys.NEUTRAL & known.DEFAULTS.keys():
        assert key in (
            "max_window_layers",
            "intermediate_size",
            "head_dim",
        )  # read by other families


@pytest.mark.parametrize("family", families())
def test_a_heeded_key_matters_or_is_refused(family: str, folder_of: Folders) -> None:
    checkpoint, config = open_checkpoint(folder_of(family)), tiny.config(family)
    # What names tensors only is held by test_tensors.py.
    for key in family_of(family).DEFAULTS.keys() - {
        "tie_word_embeddings",
        "tie_embedding",
        "num_nextn_predict_layers",
        "attention_k_eq_v",
    }:
        value, more = CHANGES[key]
        if family == "gemma4" and key in EXPERTS:
            more = EXPERTS | {k: v for k, v in more.items() if k != key}
        if key == "sliding_window":
            more = {k: v for k, v in more.items() if k in family_of(family).DEFAULTS}
        base = config | {k: v for k, v in more.items() if k in family_of(family).DEFAULTS}
        value = (not base.get(key, family_of(family).DEFAULTS[key])) if value is None else value
        assert outcome(checkpoint, base | {key: value}) != described(checkpoint, base), key


@pytest.mark.parametrize("family", families())
def test_without_a_head_the_config_must_tie(family: str, folder_of: Folders) -> None:
    checkpoint, config = open_checkpoint(folder_of(family)), tiny.config(family)
    tensors = {k: t for k, t in checkpoint.tensors.items() if k != "lm_head.weight"}
    checkpoint = replace(checkpoint, tensors=tensors)
    assert described(checkpoint, config | {"tie_word_embeddings": True}).tied
    assert not described(checkpoint, config | {"tie_word_embeddings": False}).tied


@pytest.mark.parametrize("family", families())
def test_a_fixed_key_is_refused_by_name(family: str, folder_of: Folders) -> None:
    checkpoint, config = open_checkpoint(folder_of(family)), tiny.config(family)
    for key, allowed in fixed_of(family).items():
        for value in allowed:
            described(checkpoint, config | {key: value})
        for value in (0.37, "strange", [1]):
            with pytest.raises(UnsupportedError, match=key):
                described(checkpoint, config | {key: value})


@pytest.mark.parametrize("family", families())
def test_additions_of_the_hub(family: str, folder_of: Folders) -> None:
    """Harmless ones change nothing; what speaks of arithmetic is refused by name."""
    checkpoint, config = open_checkpoint(folder_of(family)), tiny.config(family)
    known = family_of(family)
    harmless = {k: v for k, v in HARMLESS.items() if k not in known.DEFAULTS}
    assert described(checkpoint, config | harmless) == described(checkpoint, config)
    for key, value in STRANGE.items():
        if key in known.DEFAULTS or value in getattr(known, "FIXED", {}).get(key, ()):
            continue
        with pytest.raises(UnsupportedError, match=key):
            described(checkpoint, config | {key: value})


def test_two_counts_of_experts_must_agree(folder_of: Folders) -> None:
    checkpoint, config = open_checkpoint(folder_of("qwen3_moe")), tiny.config("qwen3_moe")
    other = {k: v for k, v in config.items() if k != "num_experts"}
    same = described(checkpoint, other | {"num_local_experts": tiny.EXPERTS})
    assert same == described(checkpoint, config)
    with pytest.raises(CheckpointError, match=r"num_experts is 8, num_local_experts 9"):
        described(checkpoint, config | {"num_local_experts": 9})


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ({"rope_type": "proportional"}, "proportional"),
        ({"rope_type": "default", "strange_section": [8, 8]}, "strange_section"),
        ({"rope_type": "yarn", "factor": 2.0, "alpha": 1000.0}, "alpha"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary"),
    ],
)
@pytest.mark.parametrize("family", families())
def test_unknown_ropes_are_refused(
    family: str, table: dict[str, object], word: str, folder_of: Folders
) -> None:
    if word == "partial_rotary" and word + "_factor" in family_of(family).DEFAULTS:
        return
    checkpoint, config = open_checkpoint(folder_of(family)), tiny.config(family)
    with pytest.raises(UnsupportedError, match=word):
        described(checkpoint, config | {"rope_scaling": table})


@pytest.mark.parametrize(
    ("stated_context", "original", "context"), [(64, 64, 256), (128, 32, 128), (64, None, 256)]
)
def test_yarn_makes_the_context_longer(
    stated_context: int, original: int | None, context: int, folder_of: Folders
) -> None:
    checkpoint, config = open_checkpoint(folder_of("qwen3")), tiny.config("qwen3")
    table = YARN | ({} if original is None else {"original_max_position_embeddings": original})
    config |= {"rope_scaling": table, "max_position_embeddings": stated_context}
    assert described(checkpoint, config).context == context


# --- GGUF ---------------------------------------------------------------------------------------------

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma3", "olmoe", "gpt-oss")
GGUF_KEYS = sorted(
    {
        value.removeprefix("{arch}.")
        for group in (writer.Keys.LLM, writer.Keys.Attention, writer.Keys.Rope)
        for value in vars(group).values()
        if isinstance(value, str) and value.startswith("{arch}.") and value.count("{") == 1
    }
    | {"rope.scale_linear", "strange"}
)
# Heeded ones: another value, and what must be said for it to matter.
YARN_KEYS = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 512,
}  # fmt: skip
GGUF_CHANGES: dict[str, tuple[object, dict[str, object]]] = {
    "rope.scaling.type": ("yarn", {"rope.scaling.factor": 4.0}),
    "rope.scaling.factor": (4.0, {}), "rope.scale_linear": (4.0, {}), "rope.scaling.attn_factor": (2.0, {}),
    "rope.scaling.original_context_length": (128, YARN_KEYS),
    "rope.scaling.yarn_attn_factor": (2.0, YARN_KEYS),
    "rope.scaling.yarn_beta_fast": (8.0, YARN_KEYS), "rope.scaling.yarn_beta_slow": (4.0, YARN_KEYS),
    "block_count": (2, {}), "embedding_length": (128, {}), "feed_forward_length": (32, {}),
    "context_length": (77, {}), "attention.head_count": (2, {}), "attention.head_count_kv": (1, {}),
    "attention.key_length": (16, {}), "attention.layer_norm_rms_epsilon": (1e-3, {}),
    "rope.freq_base": (5e4, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return gguf.load(write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", "qwen2"))


def of_architecture(
    checkpoint: Checkpoint, architecture: str, more: dict[str, object] | None = None
) -> Checkpoint:
    """The same numbers under another architecture's name, with the experts that some want."""
    mixed = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64}
    own = mixed if architecture in ("qwen3moe", "olmoe", "gpt-oss") else {}
    own = own | ({"attention.sliding_window": 8} if architecture in ("gemma3", "gpt-oss") else {})
    named = {k.removeprefix("qwen2."): v for k, v in checkpoint.config.items() if "qwen2." in k}
    values = {f"{architecture}.{k}": v for k, v in (named | own | (more or {})).items()}
    tensors = checkpoint.tensors
    if architecture == "olmoe":
        tensors = {k: t for k, t in tensors.items() if not k.endswith(".bias")}
    return replace(checkpoint, architecture=architecture, config=values, tensors=tensors)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_gguf_key(architecture: str, tiny_gguf: Checkpoint) -> None:
    """Refused by its name, neutral, or one of those that are read."""
    recipe(of_architecture(tiny_gguf, architecture))
    for key in GGUF_KEYS:
        if key in keys.GGUF_NEUTRAL | keys.READ:
            continue
        for value in (7, 0.37, "strange", [1, 2]):
            with pytest.raises(UnsupportedError, match=f"{architecture}.{key}"):
                recipe(of_architecture(tiny_gguf, architecture, {key: value}))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_every_gguf_key_that_is_read_matters(architecture: str, tiny_gguf: Checkpoint) -> None:
    of_experts = {"expert_count", "expert_used_count", "expert_feed_forward_length"}
    of_windows = {
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "rope.freq_base_swa",
    }
    assert GGUF_CHANGES.keys() | of_experts | of_windows == keys.READ
    for key, (value, more) in GGUF_CHANGES.items():
        if architecture == "gemma3":  # the second of its three layers is full
            more = {**more, "attention.sliding_window_pattern": 2}
        base = recipe(of_architecture(tiny_gguf, architecture, dict(more))).description
        made = of_architecture(tiny_gguf, architecture, {**more, key: value})
        assert recipe(made).description != base, key


def test_yarn_of_a_gguf_is_yarn(tiny_gguf: Checkpoint, folder_of: Folders) -> None:
    """The same numbers in either format make the same positions."""
    table = {
        "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0,
    }  # fmt: skip
    stated = {
        **YARN_KEYS, "rope.scaling.original_context_length": 64, "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 2.0, "context_length": 128,
    }  # fmt: skip
    config = tiny.config("qwen2") | {"max_position_embeddings": 128}
    theirs = described(open_checkpoint(folder_of("qwen2")), config | {"rope_scaling": YARN | table})
    ours = recipe(of_architecture(tiny_gguf, "qwen2", stated)).description
    assert ours.layers == theirs.layers
    assert ours.context == theirs.context == 256


def test_windows_of_a_gguf(tiny_gguf: Checkpoint) -> None:
    def windows(architecture: str, more: dict[str, object]) -> list[int | None]:
        made = of_architecture(tiny_gguf, architecture, more)
        return [layer.window for layer in recipe(made).description.layers]

    assert windows("gemma3", {}) == [8, 8, 8]
    assert windows("gemma3", {"attention.sliding_window_pattern": 2}) == [8, None, 8]
    listed = {"attention.sliding_window_pattern": [False, True, False]}
    assert windows("gemma3", listed) == [None, 8, None]
    assert windows("gpt-oss", {}) == [8, None, 8]
    for architecture in ("llama", "qwen2", "qwen3", "qwen3moe"):  # llama.cpp reads none for them
        assert windows(architecture, {"attention.sliding_window": 8}) == [None] * 3


def test_sizes_of_a_gguf_that_differ(tiny_gguf: Checkpoint) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        recipe(of_architecture(tiny_gguf, "llama", {key: tiny.HEAD_DIM}))
        with pytest.raises(UnsupportedError, match=f"llama.{key} is 16.*known are 32"):
            recipe(of_architecture(tiny_gguf, "llama", {key: 16}))
    with pytest.raises(UnsupportedError, match="head_count_kv differs from layer to layer"):
        recipe(of_architecture(tiny_gguf, "llama", {"attention.head_count_kv": [1, 2, 2]}))
    same = of_architecture(tiny_gguf, "llama", {"attention.head_count_kv": [2, 2, 2]})
    assert recipe(same).description.num_kv_heads == 2
    for kind in ("longrope", "proportional"):
        with pytest.raises(UnsupportedError, match=f"llama.rope.scaling.type '{kind}'"):
            recipe(of_architecture(tiny_gguf, "llama", {"rope.scaling.type": kind}))


ODD = (
    None,
    True,
    -1,
    0,
    3,
    1e30,
    "x",
    [],
    [[1], 2],
    {},
    {"rope_type": [1]},
    {"full_attention": [1]},
)


@pytest.mark.parametrize("family", families())
def test_odd_values_are_refused_with_our_errors(family: str, folder_of: Folders) -> None:
    checkpoint, config = open_checkpoint(folder_of(family)), tiny.config(family)
    known = family_of(family)
    for key in (
        *known.DEFAULTS,
        *getattr(known, "FIXED", {}),
        *keys.FIXED,
        "num_experts",
        "text_config",
    ):
        for value in ODD:
            outcome(checkpoint, config | {key: value})  # anything but our errors goes up


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_odd_values_of_a_gguf(architecture: str, tiny_gguf: Checkpoint) -> None:
    nested = [np.array([1, 2]), np.array([1, 2])]
    for key in {*GGUF_KEYS, *keys.READ}:
        for value in (*ODD, nested, np.array([1.5, 2.0]), float("nan"), float("inf")):
            with suppress(OutsizeError):
                recipe(of_architecture(tiny_gguf, architecture, {key: value}))
