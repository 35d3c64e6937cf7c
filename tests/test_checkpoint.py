"""Foreign files, read right: numbers equal the gguf package's bit for bit; every metadata type."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from outsize.checkpoint import ggml
from outsize.checkpoint import gguf as ours

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
