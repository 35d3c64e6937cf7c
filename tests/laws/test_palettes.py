"""Palettes: in every form, numbers are the file's own, products are those of the numbers, and a row's bits
are its own."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from outsize.checkpoint.coded import Coded, numbers
from outsize.encoding.palette import Palette
from outsize.engine.model import Model
from outsize.kernels import build
from outsize.kernels.find import native_in
from outsize.kernels.native import Native
from outsize.kernels.palettes import BLOCK, FORMS, pack_codes, unpack_codes
from outsize.kernels.plain import PLAIN
from outsize.kernels.structs import NativePalette

ROWS, WIDTH = 80, 512
FILED = [name for name, form in FORMS.items() if form.levels]  # those of published formats
OWN = [name for name in FORMS if name not in FILED]
needs_compiler = pytest.mark.skipif(
    build.compiler() is None, reason="no C compiler on this machine"
)


OTHERS = ["haswell", "x86-64"] if platform.machine() == "x86_64" else []  # AVX2, and SSE2


@pytest.fixture(
    scope="module",
    params=["native", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
)
def native(request: pytest.FixtureRequest, home: Path) -> Native:
    """This processor's kernels, and those that others compile: the laws are the same everywhere."""
    flags = tuple(f"-march={request.param}" if "march" in f else f for f in build.FLAGS)
    with mock.patch.object(build, "FLAGS", flags):
        found = native_in(home / request.param)
    assert found is not None
    return found


def stored(name: str, seed: int = 0) -> Coded:
    """Random codes, steps and lows, as a file may hold them."""
    form, r = FORMS[name], np.random.default_rng(seed)
    groups, blocks = (ROWS, WIDTH // form.group), (ROWS, WIDTH // BLOCK)

    def floats(shape: tuple[int, int]) -> np.ndarray:  # type: ignore[type-arg]
        made = torch.from_numpy(r.uniform(-0.02, 0.02, shape)).to(torch.float16)
        return made.bfloat16().half().float().numpy()  # what both types hold

    whole = form.step == "int8"
    low_whole = form.low in ("int8", "zero")
    return Coded(
        name,
        r.integers(0, len(form.levels), (ROWS, WIDTH), dtype=np.uint8),
        r.integers(-128, 128, groups, dtype=np.int8) if whole else floats(groups),
        floats(blocks) if whole else None,
        None if not form.low else r.integers(0, 64, groups, dtype=np.uint8) if low_whole else floats(groups),
        floats(blocks) if form.low == "int8" else None,
        r.uniform(0.5, 2, ROWS).astype(np.float32) if form.outer else None,
    )  # fmt: skip


def fields_of(c: Coded) -> dict[str, Tensor]:
    scales = {
        "step": c.step_NG, "block": c.block_NB, "low": c.low_NG, "low_block": c.low_block_NB,
        "outer": c.outer_N,
    }  # fmt: skip
    there = {name: torch.from_numpy(a) for name, a in scales.items() if a is not None}
    return Palette(c.form, FORMS[c.form]).from_codes(torch.from_numpy(c.code_NK), there)


def own_levels(name: str, backend: Native | None = None) -> tuple[Palette, dict[str, Tensor]]:
    """A palette with levels of each tile's own, all at random."""
    e = Palette(name, FORMS[name], backend or PLAIN)
    count = 1 << e.form.bits
    torch.manual_seed(count)
    scales = {"step": torch.rand(ROWS, WIDTH // 64) * 0.01}
    if e.form.step == "int8":
        scales = {"step": torch.randint(-127, 128, (ROWS, WIDTH // 64)),
                  "block": torch.rand(ROWS, WIDTH // BLOCK) * 1e-4}  # fmt: skip
    fields = e.from_codes(torch.randint(0, count, (ROWS, WIDTH)).to(torch.uint8), scales)
    fields["levels"] = torch.randint(-127, 128, (ROWS // 16, count)).to(torch.int8)
    return e, fields


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_come_back(bits: int) -> None:
    torch.manual_seed(bits)
    code_NK = torch.randint(0, 1 << bits, (48, 64)).to(torch.uint8)
    packed = pack_codes(bits, code_NK)
    assert packed.shape == (3, 4, 32 * bits)
    back = unpack_codes(bits, packed).transpose(1, 2).reshape(48, 64)
    assert torch.equal(back, code_NK)


@pytest.mark.parametrize("name", FILED)
def test_numbers_are_the_files_own(name: str) -> None:
    c = stored(name)
    e, fields = Palette(name, FORMS[name]), fields_of(c)
    assert list(fields) == list(e.specs(ROWS, WIDTH))
    assert torch.equal(e.decode(fields), torch.from_numpy(numbers(c)))
    ids = torch.tensor([0, 79, 15, 16, 33])
    assert torch.equal(e.rows(fields, ids), e.decode(fields)[ids])


@needs_compiler
@pytest.mark.parametrize("name", FORMS)
def test_products_are_those_of_the_numbers(name: str, native: Native) -> None:
    """Any number of rows gives each row the bits that it has alone; many rows decode every weight right."""
    if name in OWN:
        e, fields = own_levels(name, native)
    else:
        e, fields = Palette(name, FORMS[name], native), fields_of(stored(name))
    w_NK, product = e.decode(fields), e.product(fields)
    torch.manual_seed(3)
    x = torch.randn(60, WIDTH).bfloat16()
    want = x.float() @ w_NK.T
    alone = torch.cat([product(row, False) for row in x.split(1)])
    assert (alone.float() - want).norm() <= 0.004 * want.norm()
    for rows in (2, 3, 4, 5, 7, 8, 9, 17, 60):
        assert torch.equal(product(x[:rows], False), alone[:rows])
    columns = native._some_palettes(NativePalette(e.coded(fields)), 0, ROWS)
    exact = w_NK.bfloat16().float()
    assert ((columns.float() - exact).abs() <= exact.abs() * 2**-7).all()


@needs_compiler
@pytest.mark.parametrize("name", FILED)
def test_products_of_fp32_keep_their_precision(name: str, native: Native) -> None:
    e, fields = Palette(name, FORMS[name], native), fields_of(stored(name))
    product = e.product(fields)
    torch.manual_seed(4)
    x = torch.randn(60, WIDTH)
    want = x @ e.decode(fields).T
    alone = torch.cat([product(row, False) for row in x.split(1)])
    assert alone.dtype is torch.float32
    assert (alone - want).norm() <= 2e-4 * want.norm()
    for rows in (2, 3, 9, 60):
        assert torch.equal(product(x[:rows], False), alone[:rows])


@pytest.mark.parametrize("native", [True, False])
def test_all_logits_are_in_fp32(native: bool, open_tiny: Callable[..., Model]) -> None:
    """Not only the largest ones: steps of bf16 are 1/250 of a logit."""
    model = open_tiny("llama", "q8_0", native).transformer
    torch.manual_seed(6)
    x = torch.randn(2, model.description.width)
    want = x @ model.head_rows(torch.arange(model.description.vocab_size)).T
    assert (model.project(x) - want).norm() <= 2e-4 * want.norm()


@needs_compiler
@pytest.mark.parametrize("name", ["q4_k", "q4_0", "iq2"])
def test_rows_keep_their_size_and_what_is_no_number(name: str, native: Native) -> None:
    """However large a row is, it has the same bits but for the exponent; rows of nothing give nothing, and
    what is no number stays visible, in its own row."""
    product = Palette(name, FORMS[name], native).product(fields_of(stored(name)))
    torch.manual_seed(5)
    x = torch.randn(4, WIDTH).bfloat16()
    y = product(x, False)
    for power in (-60, 40, 80):
        assert torch.equal(product(x * 2.0**power, False), y * 2.0**power)
    x[0], x[1, 40], x[2, 95] = 0, torch.nan, -torch.inf
    bad = product(x, False)
    assert not bad[0].any()
    assert not bad[1:3].isfinite().any()
    assert torch.equal(bad[3], y[3])


@needs_compiler
def test_levels_are_read_where_they_are(native: Native) -> None:
    """A slot's bytes become those of another record, and what was made for it stays."""
    for bits in (2, 3, 4, 5, 6):
        e, fields = own_levels(f"palette{bits}", native)
        product, x = e.product(fields), torch.randn(2, WIDTH).bfloat16()
        product(x, False)
        fields["levels"].copy_(-fields["levels"].flip(1))
        want = x.float() @ e.decode(fields).T
        assert (product(x, False).float() - want).norm() <= 0.004 * want.norm()


@needs_compiler
def test_largest_inputs_and_levels_do_not_overflow(native: Native) -> None:
    e, fields = own_levels("palette6-fp16", native)
    fields["levels"].fill_(127)
    x = torch.full((9, WIDTH), 255.0).bfloat16()  # the largest number with its exponent
    want = x.float() @ e.decode(fields).T
    for sign in (1, -1):
        y = e.product(fields)(sign * x, False)
        assert ((y.float() - sign * want).abs() <= 2**-7 * want.abs()).all()


@pytest.mark.parametrize("name", OWN)
def test_levels_are_fitted(name: str) -> None:
    """Numbers that a tile's few levels hold come back as they were, but for rounding; others come back better
    than evenly spaced levels hold them."""
    e, count = Palette(name, FORMS[name]), 1 << FORMS[name].bits
    torch.manual_seed(count)
    few = (torch.rand(ROWS // 16, count) * 2 - 1).repeat_interleave(16, dim=0)
    w = few.gather(1, torch.randint(0, count, (ROWS, WIDTH)))
    assert (e.decode(e.encode(w)) - w).norm() <= 0.02 * w.norm()
    w = torch.randn(ROWS, WIDTH).mul(3).sinh()  # heavy tails
    groups = w.unflatten(1, (-1, 64))
    step = groups.abs().amax(dim=2, keepdim=True) / (count / 2)
    even = ((groups / step + 0.5).round() - 0.5) * step
    assert (e.decode(e.encode(w)) - w).norm() < 0.9 * (even - groups).norm()
    assert torch.equal(e.decode(e.encode(w * 2.0**-6)), e.decode(e.encode(w)) * 2.0**-6)


@needs_compiler
@pytest.mark.parametrize("scale", [1e-40, 1e-38, 1e-36, 1.0, 1e36])
def test_decoding_rounds_tiny_and_huge_numbers_alike(scale: float, native: Native) -> None:
    """Processors' own rounding to bf16 takes tiny numbers for zeros; ours does not."""
    torch.manual_seed(5)
    e = Palette("int4-32-fp32", FORMS["int4-32-fp32"], native)
    step = torch.rand(ROWS, WIDTH // 32) * scale
    step[::3, ::2] = 0
    fields = e.from_codes(torch.randint(0, 16, (ROWS, WIDTH)).to(torch.uint8), {"step": step})
    columns = native._some_palettes(NativePalette(e.coded(fields)), 0, ROWS)
    assert torch.equal(columns, e.decode(fields).bfloat16())
