"""Every block type of GGUF: its numbers, and its codes, are those of the gguf package. Bits are compared, but
for NaN, of which only the place is: the sign of one depends on the order of a sum."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from numpy.typing import NDArray

from outsize.checkpoint import ggml
from outsize.checkpoint.coded import Bytes, Coded, Floats, numbers
from outsize.checkpoint.ggml_grids import grid, signs
from outsize.kernels.palettes import FORMS

READABLE = [k for k in ggml.TYPES.values() if k.is_readable]
CODED = [k for k in READABLE if k.code is not None]
FP16_AT = {  # the bytes where a block has fp16 numbers; IQ1_M's lies in four pieces
    "F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
    "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0],
    "IQ3_XXS": [0], "IQ3_S": [0], "IQ1_S": [0], "IQ4_NL": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64],
}  # fmt: skip
EDGES = (0, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x7C01, 0x7E00)  # 0, subnormal, least, most, inf, NaN
NUM_BLOCKS, ROWS = 4096, 256


def random_blocks(kind: ggml.BlockType, seed: int = 3) -> Bytes:
    """(4096, size): random bytes; as fp16 numbers, every sign, exponent and higher half of the fraction, and
    EDGES of both signs together with each other."""
    random = np.random.default_rng(seed)
    out = random.integers(0, 256, (NUM_BLOCKS, kind.size), dtype=np.uint8)
    for at in FP16_AT.get(kind.name, []):
        scale = np.arange(NUM_BLOCKS) * 16 + random.integers(0, 16, NUM_BLOCKS)
        random.shuffle(scale)
        edges = np.array([*EDGES, *(e | 0x8000 for e in EDGES)])
        both = np.tile(edges, 16) if at % 4 else np.repeat(edges, 16)
        scale[: len(both)] = both
        out[:, at : at + 2] = scale.astype("<u2")[:, None].view(np.uint8)
    if kind.name == "IQ1_M":
        for i in range(4):  # its edges, four bits in each number of 16
            quarter = (np.repeat(EDGES, 16) >> (4 * i) & 15).astype(np.uint8)
            out[:128, 49 + 2 * i] = out[:128, 49 + 2 * i] & 15 | quarter << 4
    return out


def of_gguf(kind: ggml.BlockType, blocks: Bytes) -> Floats:
    floats = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    rows = blocks.reshape(ROWS, -1)
    with np.errstate(all="ignore"):
        found: Floats = quants.dequantize(
            rows if floats is None else rows.view(floats), Kind[kind.name]
        )
    return found


def assert_same(mine: Floats, theirs: Floats) -> None:
    nan = np.isnan(theirs)
    assert mine.shape == theirs.shape
    assert mine.dtype == theirs.dtype == np.float32
    assert np.array_equal(np.isnan(mine), nan)
    assert np.array_equal(mine.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


def test_every_type_of_the_package_is_read() -> None:
    assert {k.name for k in READABLE} == {k.name for k in quants._type_traits} | {"F32", "F16"}


@pytest.mark.parametrize("kind", READABLE, ids=lambda k: k.name)
def test_numbers_and_codes_are_ggufs(kind: ggml.BlockType) -> None:
    blocks = random_blocks(kind)
    theirs, raw = of_gguf(kind, blocks), blocks.reshape(-1)
    assert not np.isfinite(theirs).all() or kind.name in ("MXFP4", "NVFP4")
    assert_same(ggml.dequantize(kind, raw, theirs.shape), theirs)
    c = ggml.coded(kind, raw, (ROWS, theirs.shape[1]))
    assert (c is None) == (kind.code is None)
    if c is not None:
        assert_same(numbers(c), theirs)
        assert_fits(c)


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
