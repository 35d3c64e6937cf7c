"""Quantized safetensors stand for the numbers that their formats define, and packs keep them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import outsize
from outsize.checkpoint import safetensors
from outsize.checkpoint.checkpoint import Tensor, read_coded, read_floats, rows_of
from outsize.checkpoint.coded import numbers
from outsize.checkpoint.opening import open_checkpoint
from outsize.checkpoint.quantized import quantization
from outsize.checkpoint.safetensors_quantized import stored
from outsize.checkpoint.safetensors_quantized.join import join
from outsize.encoding.find import ENCODINGS, encoding
from outsize.family.find import recipe
from outsize.kernels.palettes import FORMS
from outsize.pack.encode import encode
from outsize.pack.kinds import rows
from outsize.pack.layout import plan, rounded_tensors
from tests.checkpoint import quantizers
from tests.checkpoint.quantizers import FORMATS, Format, compressed, group_of, packed
from tests.golden.test_golden import logits

TRUE = load_file(Path(__file__).with_name("compressed_tensors.safetensors"))
ROWS, WIDTH = 296, 320  # blocks of 128 are cut at both ends; the last group of 128 is a half


def one_matrix(folder: Path, how: Format, shape: tuple[int, int]) -> tuple[Tensor, np.ndarray]:
    """A stored matrix, and the numbers that it stands for."""
    torch.manual_seed(shape[1])
    parts, values = how.quantize(torch.randn(shape))
    path = folder / "model.safetensors"
    save_file({f"m.{k}": t.clone() for k, t in parts.items()}, path)
    scheme = quantization({"quantization_config": how.config}, folder)
    assert scheme is not None
    made, _ = join(safetensors.parse(path, safetensors.TYPES | stored.TYPES), scheme)
    return made["m.weight"], values.numpy()


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_the_formats(name: str, tmp_path: Path) -> None:
    how = FORMATS[name]
    found, values = one_matrix(tmp_path, how, (ROWS, WIDTH))
    assert found.shape == (ROWS, WIDTH)
    np.testing.assert_array_equal(read_floats(found), values)
    for start, stop in ((0, 64), (64, 192), (192, 296), (3, 14), (128, 400)):
        some = rows_of(found, start, stop)
        assert some.shape == values[start:stop].shape
        np.testing.assert_array_equal(read_floats(some), values[start:stop])
        again = rows_of(some, 1, 5)
        np.testing.assert_array_equal(read_floats(again), values[start + 1 : start + 5])


@pytest.mark.parametrize("name", sorted({key.rpartition(".")[0] for key in TRUE}))
def test_what_the_library_of_compressed_tensors_wrote(name: str, tmp_path: Path) -> None:
    """make_compressed_tensors.py; of FP4 it gives numbers in bf16."""
    parts = {k.rpartition(".")[2]: t for k, t in TRUE.items() if k.startswith(f"{name}.")}
    values, config = parts.pop("numbers"), json.loads(bytes(parts.pop("config").tolist()))
    found, _ = one_matrix(tmp_path, Format(lambda w: (parts, values.float()), config, ""), (1, 1))
    ours = torch.from_numpy(read_floats(found))
    assert torch.equal(ours.to(values.dtype), values)
    coded = read_coded(found)
    if coded is not None and values.dtype == torch.float32:
        assert torch.equal(torch.from_numpy(numbers(coded)), values)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_stand_for_the_same_numbers(name: str, tmp_path: Path) -> None:
    found, values = one_matrix(tmp_path, FORMATS[name], (ROWS, WIDTH))
    coded = read_coded(found)
    assert (coded is not None) == (found.kind.name in FORMS)
    if coded is not None:
        assert coded.form == found.kind.name
        np.testing.assert_array_equal(numbers(coded), values)


@pytest.mark.parametrize(
    ("group", "width", "form"),
    [(32, 320, "32"), (64, 320, "64"), (128, 384, "128"), (128, 320, "64"), (256, 512, "256"),
     (-1, 512, "256"), (-1, 384, "128"), (-1, 96, "32"), (1024, 512, "256"), (96, 192, "32")],
)  # fmt: skip
def test_the_largest_group_that_fits(group: int, width: int, form: str, tmp_path: Path) -> None:
    for symmetric in (True, False):
        how = Format(
            lambda w, s=symmetric: quantizers.gptq(w, group, s),  # type: ignore[misc]
            quantizers.GPTQ | {"group_size": group, "sym": symmetric},
            "",
        )
        found, values = one_matrix(tmp_path, how, (64, width))
        coded = read_coded(found)
        assert coded is not None
        assert coded.form == found.kind.name == f"{'' if symmetric else 'u'}int4-{form}"
        np.testing.assert_array_equal(numbers(coded), values)


def test_steps_of_fp32(tmp_path: Path) -> None:
    """There are forms for them, but for those that have zero points: to subtract rounds, in another place."""
    for symmetric, form in ((True, "int4-32-fp32"), (False, "")):
        config = compressed("pack-quantized", group_of(symmetric=symmetric))
        how = Format(lambda w, s=symmetric: packed(w, 32, s, dtype=torch.float32), config, form)  # type: ignore[misc]
        found, values = one_matrix(tmp_path, how, (64, 64))
        np.testing.assert_array_equal(read_floats(found), values)
        coded = read_coded(found)
        assert (coded is not None) == symmetric
        if coded is None:
            assert (
                found.kind.name == "4-bit integers in groups of 32 with fp32 steps and zero points"
            )
        else:
            assert coded.form == found.kind.name == form
            np.testing.assert_array_equal(numbers(coded), values)


def test_a_global_scale_that_is_no_power_of_two(tmp_path: Path) -> None:
    """The form multiplies where compressed-tensors divides: the last bits differ."""
    how = Format(quantizers.fp4, FORMATS["nvfp4"].config, "nvfp4")
    found, values = one_matrix(tmp_path, how, (64, 128))
    np.testing.assert_array_equal(read_floats(found), values)
    coded = read_coded(found)
    assert coded is not None
    np.testing.assert_allclose(numbers(coded), values, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_packs_hold_the_numbers_exactly_or_say_so(name: str, tmp_path: Path) -> None:
    how = FORMATS[name]
    checkpoint = open_checkpoint(quantizers.write_folder(tmp_path / "q", "llama", how))
    tables = plan(checkpoint, recipe(checkpoint), "auto", True)
    rounded = {tensor for tensor, _, _ in rounded_tensors(tables)}
    kinds = set()
    for piece in (p for t in tables for r in t.records for ps in r.values() for p in ps):
        part = piece.parts[-1]
        if part.tensor.joined is None:
            continue
        kinds.add(part.tensor.kind.name)
        assert (part.tensor.name in rounded) == (piece.encoding != part.tensor.kind.name)
        if part.tensor.name not in rounded and not part.head_dim:
            fields = encode(piece, piece.num_rows)
            decoded = encoding(piece.encoding).decode(fields)[: piece.num_rows]
            whole = np.concatenate([read_floats(p.tensor) for p in piece.parts if not p.head_dim])
            np.testing.assert_array_equal(decoded[-len(whole) :], whole)
    assert how.encoding in kinds or not how.encoding
    assert bool(rounded) == (not how.encoding)


MODELS = [
    ("llama", "fp8-blocks"), ("llama", "awq"), ("qwen2", "packed-zeros"), ("qwen3", "nvfp4"),
    ("mixtral", "gptq"), ("deepseek_v3", "fp8-blocks"), ("qwen3_next", "fp8-blocks"),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in (
        ("llama", "gptq-zeros"), ("llama", "int8"), ("qwen3_moe", "fp8-blocks"), ("qwen3_moe", "packed-bf16"),
        ("qwen3_5", "fp8-blocks"), ("qwen3_5_moe", "fp8-blocks"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name"), MODELS)
def test_models_answer_as_those_of_the_same_numbers(family: str, name: str, tmp_path: Path) -> None:
    how = FORMATS[name]
    quantized = quantizers.write_folder(tmp_path / "q", family, how)
    same = quantizers.write_folder(tmp_path / "same", family, how, as_floats=True)
    with outsize.load(str(same), encoding="fp32", quiet=True) as model:
        expected = logits(model, [40])
    with outsize.load(str(quantized), encoding="fp32", quiet=True) as model:
        np.testing.assert_array_equal(logits(model, [40]), expected)
    with outsize.load(str(quantized), quiet=True) as model:
        assert how.encoding in model.pack.encodings
        error = np.linalg.norm(logits(model, [40]) - expected) / np.linalg.norm(expected)
        # Activations are bf16, and may choose other experts; of this one a whole choice goes the other way.
        assert error < (0.2 if family == "qwen3_next" else 0.1)


@pytest.mark.parametrize(
    "name",
    ["awq", "fp8-blocks", *(pytest.param(x, marks=pytest.mark.slow) for x in ("gptq-8", "packed"))],
)
def test_quantized_embeddings_and_heads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their records are blocks of rows, which AWQ and GPTQ store as columns."""
    monkeypatch.setattr(
        quantizers, "is_quantized", lambda stem, shape: stem.startswith(("lm_head", "model.embed"))
    )
    monkeypatch.setattr(rows, "ROW_RECORD", 1)  # 64 rows a record
    how = FORMATS[name]
    quantized = quantizers.write_folder(tmp_path / "q", "llama", how)
    same = quantizers.write_folder(tmp_path / "same", "llama", how, as_floats=True)
    with outsize.load(str(same), encoding="fp32", quiet=True) as model:
        expected = logits(model, [40])
    with outsize.load(str(quantized), encoding="fp32", quiet=True) as model:
        np.testing.assert_array_equal(logits(model, [40]), expected)
    with outsize.load(str(quantized), quiet=True) as model:
        tables = [model.pack.table_of(n) for n in ("embed", "head")]
        assert all(len(t.keys) == 5 for t in tables)
        assert {m.encoding for t in tables for ms in t.tensors.values() for m in ms} == {
            {"awq": "uint4-32", "packed": "int4-32"}.get(name, how.encoding)
        }
        error = np.linalg.norm(logits(model, [40]) - expected) / np.linalg.norm(expected)
        assert error < 0.05


def test_a_pack_that_rounds_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own_home: Path
) -> None:
    folder = quantizers.write_folder(tmp_path / "q", "llama", FORMATS["int8-zeros"])
    with outsize.load(str(folder)):
        pass
    said = capsys.readouterr().err
    assert "21 quantized tensors are not kept exactly (the first, model.layers.0" in said
    assert "is 8-bit integers in groups of" in said
    assert "--encoding fp32 keeps them" in said


def test_the_most_negative_integer(open_tiny: Callable[..., object]) -> None:
    """compressed-tensors uses -128, our own int8 does not."""
    int8 = ENCODINGS["int8"]
    fields = int8.encode(torch.randn(32, 64))
    fields["codes"][::2, ::3] = -128
    x = torch.randn(5, 64).bfloat16()
    exact = x.float() @ int8.decode(fields).T
    for wide in (False, True):
        y = int8.linear(x, fields, wide)
        assert (y.float() - exact).norm() <= int8.tolerance * exact.norm()


def test_biases_of_nothing_but_zeros(tmp_path: Path) -> None:
    """AutoGPTQ wrote a bias for every matrix, also of models without."""
    how = FORMATS["gptq"]
    folder = quantizers.write_folder(tmp_path / "q", "llama", how)
    assert "model.layers.0.mlp.down_proj.bias" in open_checkpoint(folder).tensors
    with outsize.load(str(folder), quiet=True):
        pass

    def biased(w: torch.Tensor) -> quantizers.Quantized:
        parts, values = how.quantize(w)
        return parts | {"bias": torch.full((len(w),), 0.5)}, values

    folder = quantizers.write_folder(tmp_path / "r", "llama", Format(biased, how.config, ""))
    with pytest.raises(
        outsize.errors.UnsupportedError, match=r"proj\.bias' is not used .* not zero"
    ):
        outsize.load(str(folder), quiet=True)
