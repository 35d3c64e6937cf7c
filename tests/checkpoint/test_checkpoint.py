"""Foreign files, read right: numbers equal the gguf package's bit for bit; every metadata type."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from safetensors.torch import load_file, save_file

from outsize.checkpoint import ggml
from outsize.checkpoint import gguf as ours
from outsize.checkpoint.opening import open_checkpoint
from outsize.errors import CheckpointError
from outsize.kernels.plain import PLAIN
from outsize.pack import fetch
from outsize.storage.buffers import buffer
from outsize.storage.stats import IOStats
from outsize.storage.table import Table, views
from tests.golden import tiny

READABLE = [k for k in ggml.TYPES.values() if k.read is not None]


@pytest.mark.parametrize("kind", READABLE, ids=lambda k: k.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_dequantize_equals_gguf_bit_for_bit(kind: ggml.BlockType) -> None:
    raw = np.random.default_rng(3).integers(0, 256, (64, kind.size * 6), dtype=np.uint8)
    floats = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    theirs = quants.dequantize(raw if floats is None else raw.view(floats), Kind[kind.name])
    mine = ggml.dequantize(kind, raw.reshape(-1), (64, 6 * kind.length))
    assert mine.view(np.uint32).tolist() == theirs.astype(np.float32).view(np.uint32).tolist()


def test_sizes_of_all_types() -> None:
    for number, kind in ggml.TYPES.items():
        assert (kind.length, kind.size) == gguf.GGML_QUANT_SIZES[Kind(number)], kind.name


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("Q4_0", "int4"),
        ("Q4_1", "int4"),
        ("Q4_K", "int4"),
        ("Q4_0", "group4"),
        ("Q5_0", "group5"),
        ("MXFP4", "group5"),
        ("Q8_0", "group8"),
    ],
)
def test_codes_are_the_numbers(name: str, encoding: str) -> None:
    kind = ggml.BY_NAME[name]
    random = np.random.default_rng(4)
    raw = random.integers(0, 256, (8 * 4, kind.size), dtype=np.uint8)
    scales = random.uniform(0.01, 0.1, (32, 2)).astype(np.float16).view(np.uint8)
    raw[:, : 4 if name in ("Q4_1", "Q4_K") else 2] = scales[
        :, : 4 if name in ("Q4_1", "Q4_K") else 2
    ]
    if name == "MXFP4":
        raw[:, 0] = random.integers(110, 140, 32)
    shape = (8, 4 * kind.length)
    codes = ggml.codes(kind, raw.reshape(-1), shape, encoding)
    assert codes is not None
    steps, lows = (np.repeat(a, 32, axis=1) for a in (codes.step_NG, codes.low_NG))
    exact = ggml.dequantize(kind, raw.reshape(-1), shape)
    np.testing.assert_allclose(codes.code_NK * steps + lows, exact, atol=1e-5)
    if name == "MXFP4":
        assert np.array_equal(codes.code_NK * steps + lows, exact)
        raw[3, 0] = 60  # 2 ** -68: not in fp16, so that the numbers are encoded anew
        assert ggml.codes(kind, raw.reshape(-1), shape, encoding) is None
    assert ggml.codes(ggml.BY_NAME["Q6_K"], raw.reshape(-1), shape, encoding) is None


def test_every_metadata_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values: dict[str, object] = {
        "uint8": 200, "int8": -100, "uint16": 60000, "int16": -30000, "uint32": 4_000_000_000,
        "int32": -2_000_000_000, "uint64": 2**63 + 5, "int64": -(2**60), "float32": 1.5,
        "float64": 1e300, "bool": True, "string": "naïve ☃",
    }  # fmt: skip
    for name, value in values.items():
        getattr(writer, f"add_{name}")(f"t.{name}", value)
    writer.add_array("t.array", ["a", "bc", ""])
    writer.add_array("t.numbers", [1, 2, 3])
    writer.add_array("t.nested", [[1, 2], [3]])
    writer.add_custom_alignment(64)
    writer.add_tensor("x", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part = ours.parse(tmp_path / "m.gguf")
    for name, value in values.items():
        assert part.metadata[f"t.{name}"] == value
    assert part.metadata["t.array"] == ["a", "bc", ""]
    assert list(part.metadata["t.numbers"]) == [1, 2, 3]  # type: ignore[call-overload]
    nested = part.metadata["t.nested"]
    assert [list(x) for x in nested] == [[1, 2], [3]]  # type: ignore[attr-defined]
    tensor = part.tensors["x"]
    assert tensor.shape == (2, 32)
    assert tensor.offset % 64 == 0


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def mxfp4_folder(folder: Path, whole: bool) -> Path:
    """A tiny gpt-oss whose experts are in MXFP4 as it is published, or the same numbers in fp32."""
    tiny.write_folder(folder, "gpt_oss")
    tensors, random = load_file(folder / "model.safetensors"), np.random.default_rng(7)
    for name in [k for k in tensors if k.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = tensors.pop(name).shape
        blocks = random.integers(0, 256, (experts, rows, width // 32, 16), dtype=np.uint8)
        scales = random.integers(118, 124, (experts, rows, width // 32), dtype=np.uint8)
        pairs = np.stack([FP4[blocks & 15], FP4[blocks >> 4]], axis=-1)
        numbers = (
            pairs.reshape(*scales.shape, 32) * np.exp2(scales.astype(np.float32) - 127)[..., None]
        )
        if whole:
            turned = numbers.reshape(experts, rows, width).swapaxes(1, 2)
            tensors[name] = torch.from_numpy(np.ascontiguousarray(turned))
        else:
            tensors |= {
                f"{name}_blocks": torch.from_numpy(blocks),
                f"{name}_scales": torch.from_numpy(scales),
            }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("encoding", ["fp32", "auto"])
def test_mxfp4_in_safetensors(tmp_path: Path, encoding: str) -> None:
    """Two tensors a matrix: the same numbers as in fp32; in a pack of its own codes they are exact, too."""
    packs = [fetch.pack(str(mxfp4_folder(tmp_path / n, n == "whole")), encoding=encoding, quiet=True)
             for n in ("whole", "mxfp4")]  # fmt: skip
    decoded = []
    for pack in packs:
        header = next(t for t in pack.tables if t.kind == "experts")
        table = Table(pack.path, header, IOStats())
        raw, out = buffer(header.stride)
        table.read(3, out)
        weights = views(raw, header, PLAIN)
        decoded.append({k: weights[k][0].encoding.decode(weights[k][0].fields)[: weights[k][0].num_rows]
                        for k in ("gate_up", "down")})  # fmt: skip
    if encoding == "auto":
        header = next(t for t in packs[1].tables if t.kind == "experts")
        assert [m.encoding for m in header.tensors["gate_up"]] == ["group5"]
        decoded = [{"gate_up": d["gate_up"]} for d in decoded]  # 96 wide, down is no row of groups
    for name, numbers in decoded[0].items():
        assert torch.equal(numbers, decoded[1][name])


def test_mxfp4_whose_scales_do_not_fit(tmp_path: Path) -> None:
    folder = mxfp4_folder(tmp_path / "m", False)
    tensors = load_file(folder / "model.safetensors")
    name = next(k for k in tensors if k.endswith("_scales"))
    tensors[name] = tensors[name][..., :-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no scales that fit it"):
        open_checkpoint(folder)
