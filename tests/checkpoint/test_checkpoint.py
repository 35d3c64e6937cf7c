"""Foreign files, read right: every metadata type of GGUF; matrices that lie in two tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from outsize.checkpoint import gguf as ours
from outsize.checkpoint.checkpoint import read_coded, read_floats
from outsize.checkpoint.coded import numbers
from outsize.checkpoint.opening import open_checkpoint
from outsize.errors import CheckpointError
from outsize.kernels.plain import PLAIN
from outsize.pack import fetch
from outsize.storage.buffers import buffer
from outsize.storage.stats import IOStats
from outsize.storage.table import Table, views
from tests.golden import tiny


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
        for name in ("gate_up", "down"):
            assert [m.encoding for m in header.tensors[name]] == ["mxfp4"]
    for name, matrix in decoded[0].items():
        assert torch.equal(matrix, decoded[1][name])


def test_codes_of_mxfp4_in_safetensors(tmp_path: Path) -> None:
    found = open_checkpoint(mxfp4_folder(tmp_path / "m", False)).tensors
    stacks = [t for t in found.values() if t.scales is not None]
    assert stacks
    for stack in stacks:
        rows = replace(stack, shape=(math.prod(stack.shape[:-1]), stack.shape[-1]))
        coded = read_coded(rows)
        assert coded is not None
        assert coded.form == "mxfp4"
        assert np.array_equal(numbers(coded), read_floats(stack).reshape(rows.shape))


def test_mxfp4_whose_scales_do_not_fit(tmp_path: Path) -> None:
    folder = mxfp4_folder(tmp_path / "m", False)
    tensors = load_file(folder / "model.safetensors")
    name = next(k for k in tensors if k.endswith("_scales"))
    tensors[name] = tensors[name][..., :-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no scales that fit it"):
        open_checkpoint(folder)
