"""Quantized safetensors that are stored otherwise than is known are named; damaged ones give our errors."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import outsize
from outsize.checkpoint.checkpoint import read_coded, read_floats
from outsize.checkpoint.opening import open_checkpoint
from outsize.checkpoint.quantized import quantization
from outsize.errors import CheckpointError, OutsizeError, PackError, UnsupportedError
from tests.checkpoint import quantizers
from tests.checkpoint.quantizers import AWQ, FORMATS, FP8, GPTQ, compressed, group_of
from tests.golden import tiny

Config = dict[str, Any]
REFUSED: list[tuple[Config, str]] = [
    (AWQ | {"bits": 3}, r"AWQ \(3 bits\), bits 3"),
    (AWQ | {"zero_point": False}, r"AWQ \(4 bits\), zero_point False"),
    (AWQ | {"version": "gemv_fast"}, r"AWQ \(4 bits\), version 'gemv_fast'"),
    (AWQ | {"backend": "llm-awq"}, r"AWQ \(4 bits\), backend 'llm-awq'"),
    (AWQ | {"group_size": 0}, "AWQ .*group_size 0"),
    (AWQ | {"group_size": "all"}, "AWQ .*group_size 'all'"),
    (AWQ | {"group_size": True}, "AWQ .*group_size True"),
    (GPTQ | {"bits": 3}, r"GPTQ \(3 bits\), bits 3"),
    (GPTQ | {"bits": True}, "GPTQ.*bits True"),
    (GPTQ | {"desc_act": True}, r"GPTQ .*its inputs in the order of activations \(desc_act\)"),
    (GPTQ | {"checkpoint_format": "marlin"}, "GPTQ .*checkpoint_format 'marlin'"),
    (GPTQ | {"is_marlin_format": True}, "GPTQ .*is_marlin_format True"),
    (GPTQ | {"pack_dtype": "int64"}, "GPTQ .*pack_dtype 'int64'"),
    (GPTQ | {"dynamic": {r"+:.*\.18\..*": {"bits": 8}}}, r"GPTQ .*some modules otherwise .*\(dynamic\)"),
    (GPTQ | {"rotation": "hadamard"}, "GPTQ .*rotation 'hadamard'"),
    (FP8 | {"weight_block_size": [1, 32]}, r"FP8, weight_block_size \[1, 32\]"),
    (FP8 | {"fmt": "e5m2"}, "FP8, fmt 'e5m2'"),
    (FP8 | {"expert_dtype": "fp4"}, "FP8, expert_dtype 'fp4'"),
    (compressed("marlin-24"), r"compressed-tensors \(marlin-24\), format 'marlin-24'"),
    (compressed("pack-quantized", transform_config={"config_groups": {"u": {}}}), "transform_config"),
    (compressed("pack-quantized", sparsity_config={"format": "sparse-24-bitmask"}),
     "sparsity_config format 'sparse-24-bitmask'"),
    (compressed("pack-quantized") | {"config_groups": None}, "without config_groups"),
    (compressed("pack-quantized") | {"config_groups": {"W4A16": ["Linear"]}}, r"config_groups \['Linear'\]"),
    (compressed("pack-quantized", {"weights": 4}), "weights 4"),
    (compressed("pack-quantized", group_of(6)), "integers of 6 bits"),
    (compressed("pack-quantized", group_of(4, actorder="group")), r"order of activations \(actorder\)"),
    (compressed("pack-quantized", group_of(4, dynamic=True)), "dynamic True"),
    (compressed("pack-quantized", group_of(4, type="complex")), "type 'complex'"),
    (compressed("pack-quantized", group_of(4, strategy="token")), "strategy 'token'"),
    (compressed("pack-quantized", group_of(4, None, strategy="group")), "strategy 'group' with group_size 0"),
    (compressed("float-quantized", group_of(16, None, type="float")), "floats of 16 bits"),
    (compressed("float-quantized", group_of(8, None, False, type="float")), "floats with zero points"),
    (compressed("float-quantized", group_of(8, None, type="float", strategy="block", block_structure=[64])),
     r"block_structure \[64\]"),
    (compressed("pack-quantized", group_of(4) | {"format": "mxfp6-pack-quantized"}), "mxfp6-pack"),
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("q") / "m", "qwen2")


@pytest.mark.parametrize(("config", "found"), REFUSED)
def test_other_ways_are_refused_by_name(plain: Path, config: Config, found: str) -> None:
    (plain / "config.json").write_text(
        json.dumps(tiny.config("qwen2") | {"quantization_config": config})
    )
    message = f"quantized with .*{found}.* does not read; use the original checkpoint .* or a GGUF"
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(plain)


def test_harmless_settings_are_read_over(tmp_path: Path) -> None:
    folder = quantizers.write_folder(tmp_path / "m", "llama", FORMATS["gptq"])
    for more in (
        {"dynamic": {"-:.*lm_head.*": {}}, "meta": {"quantizer": ["x:1"]}, "damp_percent": 0.1},
        {
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "true_sequential": True,
            "lm_head": False,
        },
    ):
        settings = {"quantization_config": GPTQ | more}
        (folder / "config.json").write_text(json.dumps(tiny.config("llama") | settings))
        assert open_checkpoint(folder).tensors["model.layers.0.mlp.up_proj.weight"].joined


def test_older_folders_say_it_in_a_file_of_their_own(tmp_path: Path) -> None:
    for name, file, said in (
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
        ("awq", "quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
    ):  # fmt: skip
        folder = quantizers.write_folder(tmp_path / name, "llama", FORMATS[name])
        new = open_checkpoint(folder).tensors
        (folder / "config.json").write_text(json.dumps(tiny.config("llama")))
        (folder / file).write_text(json.dumps(said))
        found = open_checkpoint(folder)
        assert {k: t.kind.name for k, t in found.tensors.items()} == {
            k: t.kind.name for k, t in new.items()
        }
        assert folder / file in found.sidecars, "it decides the numbers"
        (folder / file).write_text(json.dumps({"quant_method": "hqq"}))
        with pytest.raises(UnsupportedError, match="quantized with HQQ"):
            open_checkpoint(folder)
    (folder / file).unlink()
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="quantized with ModelOpt"):
        open_checkpoint(folder)


def test_any_config_is_read_or_refused(tmp_path: Path) -> None:
    """2,000 configs with values that have no place in them."""
    r, bases = random.Random(23), [how.config for how in FORMATS.values()]
    values = (
        None,
        True,
        -1,
        0,
        4,
        1 << 70,
        1.5,
        "",
        "int",
        "x" * 500,
        [],
        [128, 128],
        [[]],
        {},
        {"a": {}},
    )
    results, longest = Counter[str](), 0
    for _ in range(2000):
        config = json.loads(json.dumps(r.choice(bases)))
        inner = [config, *(g for g in (config.get("config_groups") or {}).values())]
        inner += [g["weights"] for g in inner[1:]]
        for _ in range(r.choice((1, 1, 3))):
            one = r.choice(inner)
            one[r.choice([*one, "format", "dynamic", "symmetric", "fmt"])] = r.choice(values)
        try:
            results[type(quantization({"quantization_config": config}, tmp_path)).__name__] += 1
        except UnsupportedError as e:
            results["refused"] += 1
            longest = max(longest, len(str(e)))
    assert results["refused"] > 500 < results["Scheme"]
    assert longest < 700


STEM = "model.layers.0.mlp.up_proj"
Change = Callable[[dict[str, torch.Tensor]], object]


def put(name: str, tensor: torch.Tensor) -> Change:
    return lambda x: x.__setitem__(f"{STEM}.{name}", tensor.contiguous())


def without(name: str) -> Change:
    return lambda x: x.pop(f"{STEM}.{name}")


I32 = torch.int32
DAMAGES: list[tuple[str, Change, type[OutsizeError], str]] = [
    ("awq", without("qzeros"), CheckpointError, "up_proj.qzeros' is missing"),
    ("awq", put("scales", torch.ones(3, 96).half()), CheckpointError, r"shape \(3, 96\), \(2, 96\) is due"),
    ("awq", put("scales", torch.ones(2, 96, dtype=I32)), CheckpointError, "type I32, F16 or BF16 or F32"),
    ("awq", put("qzeros", torch.ones(2, 11, dtype=I32)), CheckpointError, r"\(2, 11\), \(2, 12\) is due"),
    ("awq", put("qweight", torch.ones(0, 12, dtype=I32)), CheckpointError, "not rows and columns"),
    ("awq", put("qweight", torch.ones(64, dtype=I32)), CheckpointError, "not rows and columns"),
    ("awq", put("weight", torch.ones(96, 64)), CheckpointError, "up_proj.weight' is there in two forms"),
    ("gptq", put("g_idx", torch.zeros(63, dtype=I32)), CheckpointError, r"\(63,\), \(64,\) is due"),
    ("fp8-blocks", without("weight_scale_inv"), CheckpointError, "up_proj.weight_scale' is missing"),
    ("fp8-blocks", put("weight_scale_inv", torch.ones(2, 1)), CheckpointError, r"\(2, 1\), \(1, 1\) is due"),
    ("fbgemm", put("weight_scale", torch.ones(95, 1)), CheckpointError, r"\(96, 1\) or \(96,\) is due"),
    ("fbgemm", put("weight_scale", torch.ones(96, 1, dtype=I32)), CheckpointError, "type I32, F16 or"),
    ("packed", without("weight_shape"), CheckpointError, "has no weight_shape"),
    ("packed", without("weight_scale"), CheckpointError, "weight_scale' is missing"),
    ("packed", put("weight_scale", torch.ones(96, 3).half()), UnsupportedError, "fits none of the 1 kinds"),
    ("packed", put("weight_shape", torch.ones(3, dtype=I32)), CheckpointError, r"\(2,\) is due"),
    ("packed-zeros", without("weight_zero_point"), UnsupportedError, "fits none of the 1 kinds"),
    ("packed-zeros", put("weight_zero_point", torch.ones(5, 2, dtype=I32)), CheckpointError, r"\(12, 2\) is"),
    ("packed", put("weight_packed", torch.ones(96, 8, dtype=torch.uint8)), UnsupportedError, "fits none"),
    ("int8", put("weight_scale", torch.ones(96).bfloat16()), UnsupportedError, "fits none"),
    ("nvfp4", without("weight_global_scale"), CheckpointError, "weight_global_scale' is missing"),
    ("nvfp4", put("weight_scale", torch.ones(96, 4)), CheckpointError, "type F32, F8_E4M3 is due"),
    ("mxfp4", put("weight_packed", torch.ones(96, 31, dtype=torch.uint8)), CheckpointError, "62 inputs, no"),
    ("mxfp4", put("weight_scale", torch.ones(96, 3).byte()), CheckpointError, r"\(96, 3\), \(96, 2\) is due"),
    ("fp8-blocks", put("quant_map", torch.ones(4).byte()), UnsupportedError, "quant_map' has type U8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "error", "message"), DAMAGES)
def test_damaged_headers(
    name: str, change: Change, error: type[OutsizeError], message: str, tmp_path: Path
) -> None:
    folder = damaged(tmp_path / "m", name, change)
    with pytest.raises(error, match=message):
        open_checkpoint(folder)


def damaged(folder: Path, name: str, change: Change) -> Path:
    quantizers.write_folder(folder, "llama", FORMATS[name])
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


BACKWARD = torch.arange(63, -1, -1) // 32
LIES: list[tuple[str, Change, type[OutsizeError], str]] = [
    ("gptq", put("g_idx", BACKWARD.to(I32)), UnsupportedError, "in the order of activations"),
    ("gptq", put("g_idx", torch.full((64,), 7, dtype=I32)), CheckpointError, "names groups 7 to 7 of 2"),
    ("gptq", put("g_idx", torch.full((64,), -1, dtype=I32)), CheckpointError, "names groups -1 to -1 of 2"),
    ("gptq", put("qzeros", torch.zeros(2, 12, dtype=I32)), UnsupportedError,
     "a zero point of 1, and the config says that it is symmetric, which is 8"),
    ("gptq-zeros", put("qzeros", torch.full((2, 12), 15, dtype=I32)), UnsupportedError,
     "stores a zero point of 15, which programs read as 16 or as 0; use a checkpoint of format gptq_v2"),
    ("packed", put("weight_shape", torch.tensor([96, 65])), CheckpointError,
     r"says \[96, 65\], and there are 96 x 64 codes"),
    ("packed", put("weight_g_idx", BACKWARD.to(I32)), UnsupportedError, "in the order of activations"),
    ("packed", put("weight_zero_point", torch.zeros(12, 2, dtype=I32)), CheckpointError,
     "has zero points, and the config says symmetric"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "error", "message"), LIES)
def test_lies_that_only_the_numbers_tell(
    name: str, change: Change, error: type[OutsizeError], message: str, tmp_path: Path
) -> None:
    tensor = open_checkpoint(damaged(tmp_path / "m", name, change)).tensors[f"{STEM}.weight"]
    for read in (read_floats, read_coded):
        with pytest.raises(error, match=message):
            read(tensor)


def test_a_matrix_that_two_kinds_could_hold(tmp_path: Path) -> None:
    """64 codes of 4 bits, or 32 of 8: a scale a row fits both."""
    how = quantizers.Format(
        lambda w: quantizers.packed(w, -1),
        compressed("pack-quantized", group_of(4, None), group_of(8, None)), "",
    )  # fmt: skip
    folder = quantizers.write_folder(tmp_path / "m", "llama", how)
    with pytest.raises(UnsupportedError, match="fits 2 of the 2 kinds of weights in config_groups"):
        open_checkpoint(folder)


def test_symmetric_zero_points_as_the_other_format_stores_them(tmp_path: Path) -> None:
    """GPTQModel writes 8 where its config says "gptq", which stores 7: symmetric is what both mean."""
    said = load_file(damaged(tmp_path / "a", "gptq", lambda _: None) / "model.safetensors")
    assert (said[f"{STEM}.qzeros"] == 0x77777777).all()
    change = put("qzeros", said[f"{STEM}.qzeros"] + 0x11111111)
    folders = tmp_path / "a", damaged(tmp_path / "b", "gptq", change)
    seven, eight = (read_floats(open_checkpoint(f).tensors[f"{STEM}.weight"]) for f in folders)
    assert (seven == eight).all()


@pytest.mark.parametrize("scale", [torch.nan, torch.inf])
def test_scales_that_are_no_numbers(scale: float, tmp_path: Path) -> None:
    """However a token is drawn, the reply is an error in words."""
    change = put("scales", torch.full((2, 96), scale).half())
    with outsize.load(str(damaged(tmp_path / "m", "gptq", change)), quiet=True) as model:
        for temperature in (0.0, 0.7):
            with pytest.raises(
                PackError, match=r"largest logit is nan.* values that are not finite"
            ):
                model.generate("ab", raw=True, max_tokens=4, temperature=temperature)
