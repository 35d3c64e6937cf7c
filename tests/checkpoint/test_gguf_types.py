"""A small GGUF whose matrices have every type, whole and damaged, and factors beside its weights."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import outsize
from outsize.checkpoint import ggml
from outsize.checkpoint.checkpoint import Tensor, read_coded, read_codes, read_floats, read_raw
from outsize.checkpoint.coded import Bytes, Floats, numbers
from outsize.checkpoint.opening import open_checkpoint
from outsize.errors import OutsizeError, UnsupportedError
from tests.checkpoint.blocks import (
    READABLE,
    assert_same,
    matrices,
    of_gguf,
    sane_blocks,
    write_model,
)
from tests.golden import tiny
from tests.golden.test_golden import TOLERANCE, experts_as, logits, reference, write_gguf
from tests.hostile import MUTATIONS


def test_every_number_of_a_small_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", matrices())
    tensors, found = open_checkpoint(path).tensors, set()
    for theirs in gguf.GGUFReader(path).tensors:
        name = theirs.tensor_type.name
        data = theirs.data.reshape(-1, theirs.data.shape[-1]).view(np.uint8)
        expected = of_gguf(name, data).reshape(tensors[theirs.name].shape)
        assert_same(read_floats(tensors[theirs.name]), expected)
        if expected.ndim == 2:
            found.add(name)
            coded = read_coded(tensors[theirs.name])
            if coded is not None:
                assert_same(numbers(coded), expected)
    assert found == {k.name for k in READABLE}


def test_a_model_of_all_types_answers_as_one_of_their_numbers(tmp_path: Path) -> None:
    weights = matrices()
    f32 = ggml.BY_NAME["F32"]
    whole = {
        k: (f32, of_gguf(kind.name, rows).view(np.uint8)) for k, (kind, rows) in weights.items()
    }
    answers = []
    for name, each in (("typed", weights), ("whole", whole)):
        path = write_model(tmp_path / f"{name}.gguf", each)
        with outsize.load(str(path), encoding="fp32", quiet=True) as model:
            answers.append(logits(model, [40]))
    assert np.isfinite(answers[0]).all()
    assert answers[0].std() > 0.01
    assert np.array_equal(*answers)


def small_file(path: Path) -> dict[str, Bytes]:
    """Matrices of 2 x 256, one of each type, by name; no model. What opens it needs no more."""
    generator, out = np.random.default_rng(6), {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("none")
    for kind in READABLE:
        rows = sane_blocks(kind, 512 // kind.length, generator).reshape(2, -1)
        floats = {"F32": np.float32, "F16": np.float16}.get(kind.name)
        data = rows if floats is None else rows.view(floats)
        writer.add_tensor(
            f"{kind.name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind.name]
        )
        out[f"{kind.name}.weight"] = rows
    writer.add_tensor("NVFP4.scale", np.array([0.75], np.float32))
    writer.add_tensor("Q4_K.scale", np.array([0.7], np.float32))
    writer.add_tensor("IQ4_XS.input_scale", np.array([7], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def small_numbers(name: str, rows: Bytes) -> Floats:
    """What a weight of that file stands for."""
    factor = {"NVFP4": 0.75, "Q4_K": 0.7}.get(name, 1.0)
    out: Floats = of_gguf(name, rows) * np.float32(factor)
    return out


def test_factors_beside_weights(tmp_path: Path) -> None:
    path, rows = tmp_path / "m.gguf", small_file(tmp_path / "m.gguf")
    tensors = open_checkpoint(path).tensors
    assert (
        tensors.keys() == rows.keys()
    )  # no scale is a tensor of its own, and input_scale is left out
    for name, tensor in tensors.items():
        assert_same(read_floats(tensor), small_numbers(tensor.kind.name, rows[name]))
    nvfp4, q4_k = tensors["NVFP4.weight"], tensors["Q4_K.weight"]
    coded = read_coded(nvfp4)
    assert coded is not None
    assert coded.outer_N is not None
    assert coded.outer_N.tolist() == [0.75] * 2
    assert_same(numbers(coded), read_floats(nvfp4))
    assert read_coded(q4_k) is None  # its form has no place for a factor
    assert read_codes(q4_k, "int4") is None


def test_a_model_with_factors_is_the_same_model(tmp_path: Path) -> None:
    """Of whole weights, and of each of stacked experts: powers of two, so that no number changes."""
    weights = experts_as("stacked")
    for i in range(tiny.LAYERS):
        for part in ("gate", "up", "down"):
            factors = np.exp2(np.arange(tiny.EXPERTS) % 5 - 2).astype(np.float32)
            weights[f"blk.{i}.ffn_{part}_exps.weight"] = (
                weights[f"blk.{i}.ffn_{part}_exps.weight"] / factors[:, None, None]
            )
            weights[f"blk.{i}.ffn_{part}_exps.scale"] = factors
            weights[f"blk.{i}.ffn_{part}_exps.input_scale"] = factors * 3
        output = f"model.layers.{i}.self_attn.o_proj"
        weights[f"{output}.weight"] = weights[f"{output}.weight"] * 4
        weights[f"{output}.scale"] = np.array([0.25], np.float32)
    path = write_gguf(tmp_path / "m.gguf", "mixtral", weights=weights)
    with outsize.load(str(path), encoding="fp32", quiet=True) as model:
        ours = logits(model, [40])
    np.testing.assert_allclose(ours, reference("mixtral"), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "factor", [np.ones(2, np.float32), np.ones((1, 1), np.float32), np.ones(1, np.int32)]
)
def test_a_factor_that_does_not_fit_is_refused(tmp_path: Path, factor: NDArray[np.generic]) -> None:
    weights = tiny.weights("llama") | {"blk.1.ffn_up.scale": factor}
    path = write_gguf(tmp_path / "m.gguf", "llama", weights=weights)
    with pytest.raises(UnsupportedError, match=r"'blk\.1\.ffn_up\.scale' is not used"):
        outsize.load(str(path), quiet=True)


def described(tensor: Tensor) -> tuple[object, ...]:
    factor = None if tensor.factor is None else tensor.factor.offset
    return tensor.kind.name, tensor.shape, tensor.offset, factor


def assert_right(tensor: Tensor) -> None:
    """The numbers that gguf gives for the same bytes, or a refusal of the type."""
    try:
        mine = read_floats(tensor)
    except UnsupportedError:
        assert not tensor.kind.is_readable
        return
    raw = read_raw(tensor)
    theirs = of_gguf(tensor.kind.name, raw.reshape(1, -1)).reshape(tensor.shape)
    if tensor.factor is not None:
        factors = read_floats(tensor.factor).reshape(-1, *(1 for _ in tensor.shape[1:]))
        with np.errstate(all="ignore"):
            theirs = theirs * factors
    assert_same(mine, theirs)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_mutants_of_the_header_give_our_errors_or_the_right_numbers(
    tmp_path: Path, seed: int
) -> None:
    """500 each: bits, numbers, names, types and lengths of the header, and files that end too early."""
    path, r, results = tmp_path / "m.gguf", random.Random(seed), Counter[str]()
    small_file(path)
    whole, sound = path.read_bytes(), open_checkpoint(path).tensors
    header = min(t.offset for t in sound.values())
    for _ in range(500):
        head, tail = bytearray(whole[:header]), whole[header:]
        for mutation in r.sample(MUTATIONS, r.choice((1, 1, 2))):
            if len(head) > 1000:
                mutation(r, head)
        path.write_bytes(head + (tail if r.random() < 0.9 else tail[: r.randrange(len(tail))]))
        try:
            tensors = open_checkpoint(path).tensors
        except OutsizeError:
            results["refused"] += 1
            continue
        results["read"] += 1
        for name, tensor in tensors.items():
            if name not in sound or described(tensor) != described(sound[name]):
                results["other tensors"] += 1
                assert_right(tensor)
    assert min(results["refused"], results["read"], results["other tensors"]) > 20, results
