"""Kinds of files that are not read are named for what they are, in one sentence with the way out."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from outsize.checkpoint.opening import open_checkpoint
from outsize.errors import UnsupportedError
from tests.golden import tiny


def no_model(path: Path, kind: str, architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    if kind:
        writer.add_type(kind)
    if kind != "vocab":
        writer.add_tensor("x", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


QUANTIZED = [
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ .4 bits"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "GPTQ .8 bits"),
    ({"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}},
     "compressed-tensors .nvfp4-pack"),
    ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes .4 bits"),
    ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes .8 bits"),
    ({"quantization": {"bits": 4, "group_size": 64}}, "MLX .4 bits"),
    ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "ModelOpt .NVFP4"),
    ({"quantization_config": {"quant_method": "hqq"}}, "HQQ"),
    ({"quantization_config": {"quant_method": "quanto"}}, "Quanto"),
    ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
    ({"quantization_config": {"quant_method": "newest"}}, "newest"),
    ({"text_config": {"quantization_config": {"quant_method": "modelopt"}}}, "ModelOpt"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("q") / "m", "qwen2")


@pytest.mark.parametrize(("config", "name"), QUANTIZED)
def test_quantized_safetensors_are_named(
    folder: Path, config: dict[str, object], name: str
) -> None:
    plain = tiny.config("qwen2")
    (folder / "config.json").write_text(json.dumps(plain | config))
    message = f"quantized with {name}.*; use the original checkpoint .* or a GGUF"
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(folder)
    for harmless in (
        None,
        {},
        {"quant_method": "mxfp4"},
        {"load_in_4bit": False, "load_in_8bit": False},
    ):
        (folder / "config.json").write_text(json.dumps(plain | {"quantization_config": harmless}))
        assert open_checkpoint(folder).tensors
    (folder / "config.json").write_text(json.dumps(plain))
    (folder / "quantize_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="quantized with GPTQ"):
        open_checkpoint(folder)
    (folder / "quantize_config.json").unlink()


def test_a_type_that_no_config_explains(tmp_path: Path) -> None:
    path = tiny.write_folder(tmp_path / "m", "qwen2") / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"F8E"', 1))
    with pytest.raises(UnsupportedError, match=r"tensor '.*' has type F8E; outsize reads F32"):
        open_checkpoint(path.parent)


def test_types_of_newer_tools_are_named(tmp_path: Path) -> None:
    raw = no_model(tmp_path / "m.gguf", "model").read_bytes()
    at = raw.index(b"\x01\x00\x00\x00\x00\x00\x00\x00x") + 9 + 4 + 16
    names = {41: "Q1_0", 139: "IQ4_K of ik_llama.cpp", 36: "I2_S", 31: "Q4_0_4_4",
             300: "number 300 of ik_llama.cpp", 9999: "number 9999, which is not known"}  # fmt: skip
    for number, name in names.items():
        (tmp_path / "m.gguf").write_bytes(raw[:at] + number.to_bytes(4, "little") + raw[at + 4 :])
        with pytest.raises(UnsupportedError, match=rf"m\.gguf: tensor 'x' has type {name}"):
            open_checkpoint(tmp_path / "m.gguf")
