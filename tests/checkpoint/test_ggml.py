"""Every block type of GGUF: its numbers, and its codes, are those of the gguf package."""

from __future__ import annotations

import tracemalloc
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from numpy.typing import NDArray

from outsize.checkpoint import ggml
from outsize.checkpoint.coded import Coded, numbers
from outsize.checkpoint.ggml_grids import grid, signs
from outsize.kernels.palettes import FORMS
from tests.checkpoint.blocks import READABLE, assert_same, of_gguf, random_blocks

ROWS = 256


def test_every_type_of_the_package_is_read() -> None:
    assert {k.name for k in READABLE} == {k.name for k in quants._type_traits} | {"F32", "F16"}


@pytest.mark.parametrize("kind", READABLE, ids=lambda k: k.name)
def test_numbers_and_codes_are_ggufs(kind: ggml.BlockType) -> None:
    blocks = random_blocks(kind)
    theirs, raw = of_gguf(kind.name, blocks.reshape(ROWS, -1)), blocks.reshape(-1)
    assert not np.isfinite(theirs).all() or kind.name in ("MXFP4", "NVFP4")
    assert_same(ggml.dequantize(kind, raw, theirs.shape), theirs)
    c = ggml.coded(kind, raw, (ROWS, theirs.shape[1]))
    assert (c is None) == (kind.code is None)
    if c is not None:
        assert_same(numbers(c), theirs)
        assert_fits(c)


def test_memory_while_a_tensor_is_read() -> None:
    """A vocabulary's matrix is 2 GB as fp32, and its reader adds no more than it must."""
    for kind in READABLE:
        raw = np.zeros((1 << 18) // kind.length * kind.size, np.uint8)
        for read, most in ((ggml.dequantize, 11), (ggml.coded, 4)):
            tracemalloc.start()
            read(kind, raw, (64, 4096))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < most << 18, f"{kind.name}: {peak / (1 << 18):.1f} bytes a weight"


def assert_fits(c: Coded) -> None:
    """Is all of it as its form stores it?"""
    form = FORMS[c.form]
    rows, width = c.code_NK.shape
    assert c.code_NK.max() < 1 << form.bits
    assert c.step_NG.shape == (rows, width // form.group)
    assert (c.block_NB is not None) == (form.step == "int8")
    assert (c.low_NG is not None) == bool(form.low)
    assert (c.low_block_NB is not None) == (form.low == "int8")
    assert (c.outer_N is not None) == form.outer
    floats: list[tuple[NDArray[Any] | None, str]] = [(c.block_NB, "fp16"), (c.low_block_NB, "fp16")]
    if form.step == "int8":
        assert c.step_NG.dtype == np.int8
        assert c.block_NB is not None
        assert c.block_NB.shape == (rows, width // 256)
    else:
        floats.append((c.step_NG, form.step))
    if form.low == "int8":
        assert c.low_NG is not None
        assert c.low_NG.dtype == np.uint8
        assert c.low_block_NB is not None
        assert c.low_block_NB.shape == (rows, width // 256)
    else:
        floats.append((c.low_NG, form.low))
    for array, stored in floats:
        if array is not None:
            assert array.dtype == np.float32
            kept = array[~np.isnan(array)]
            if stored == "fp16":
                assert np.array_equal(kept.astype(np.float16).astype(np.float32), kept)
            else:
                assert not (kept.view(np.uint32) & 0xFFFF).any()


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"])
def test_grids_are_ggufs(name: str) -> None:
    theirs = quants._type_traits[Kind[name]]
    theirs.init_grid()
    assert theirs.grid is not None
    mine = grid(name.replace("IQ1_S", "IQ1"))
    digits = mine.view(np.uint8).reshape(theirs.grid_shape)
    assert np.array_equal(np.array(theirs.grid_map)[digits], theirs.grid.reshape(theirs.grid_shape))


def test_signs_are_ggufs() -> None:
    assert signs().tobytes() == quants.IQ2_XXS.ksigns


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
    size = 4 if name in ("Q4_1", "Q4_K") else 2
    raw[:, :size] = scales[:, :size]
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
