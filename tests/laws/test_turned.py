"""Sums in few bits: the C kernel's bits are the plain twin's; what is lost is what the bits say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from outsize.errors import OptionError
from outsize.home import home
from outsize.kernels.find import native_in
from outsize.kernels.plain import PLAIN
from outsize.kernels.turned import (
    BITS,
    NativeTurner,
    PlainTurner,
    block_of,
    row_bytes,
    turn,
    turner,
)

each = pytest.mark.parametrize("bits", BITS)
ERRORS = {4: 0.13, 5: 0.06, 6: 0.03, 8: 0.008}  # relative, of normal numbers


@pytest.fixture(scope="module")
def native() -> object:
    found = native_in(home() / "native")
    if found is None:
        pytest.skip("no C compiler on this machine")
    return found


def parts(world: int, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """With features that are far larger than others, zeros, and rows of many sizes."""
    made = torch.Generator().manual_seed(rows + width)
    out = []
    for _ in range(world):
        x = torch.randn(rows, width, generator=made)
        x[:, ::37] *= 100
        x *= torch.logspace(-8, 4, rows)[:, None]
        x[rows // 2 :, :32] = 0
        out.append(x.to(dtype))
    return out


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("rows", "width"), [(1, 128), (3, 576), (19, 896), (2, 32), (40, 96)])
def test_c_and_torch_agree_to_the_bit(
    native: object, bits: int, dtype: torch.dtype, rows: int, width: int
) -> None:
    fast, plain = turner(bits, native), PlainTurner(bits)  # type: ignore[arg-type]
    assert isinstance(fast, NativeTurner)
    given = parts(3, rows, width, dtype)
    messages = [fast.pack(x) for x in given]
    for message, x in zip(messages, given, strict=True):
        assert message.shape == (rows, row_bytes(width, bits))
        assert torch.equal(message, plain.pack(x))
    assert torch.equal(fast.sum(messages, width), plain.sum(messages, width))
    turned = fast.sum(messages, width, turned=True)
    assert torch.equal(turned, plain.sum(messages, width, turned=True))
    assert torch.equal(fast.pack(turned, turned=True), plain.pack(turned, turned=True))


@each
def test_what_is_lost(bits: int) -> None:
    given = parts(2, 8, 896, torch.float32)
    plain = PlainTurner(bits)
    got, wanted = plain.sum([plain.pack(x) for x in given], 896), given[0] + given[1]
    error = (got - wanted)[2:].norm(dim=1) / wanted[2:].norm(
        dim=1
    )  # the first are below fp16's steps
    assert float(error.max()) < ERRORS[bits]
    assert float(error.max()) > ERRORS[bits] / 40


def test_turning_is_orthonormal_and_its_own_inverse() -> None:
    for block in (32, 64, 128):
        matrix = turn(torch.eye(block))
        assert torch.allclose(matrix @ matrix.T, torch.eye(block), atol=1e-6)
        assert torch.allclose(turn(matrix), torch.eye(block), atol=1e-6)


@each
def test_all_codes_come_back(bits: int) -> None:
    """Whole numbers times a step that are in turned space already are exact."""
    most = (1 << bits - 1) - 1
    x = (torch.arange(128) % (2 * most + 1) - most).float()[None] * 0.25
    x[0, 0] = most * 0.25
    plain = PlainTurner(bits)
    assert torch.equal(plain.sum([plain.pack(x, turned=True)], 128, turned=True), x)


@each
def test_a_rows_message_does_not_depend_on_its_company(bits: int) -> None:
    (x,) = parts(1, 9, 192, torch.bfloat16)
    plain = PlainTurner(bits)
    assert torch.equal(torch.cat([plain.pack(row[None]) for row in x]), plain.pack(x))


def test_sizes() -> None:
    assert [block_of(w) for w in (896, 576, 96)] == [128, 64, 32]
    assert row_bytes(896, 4) == 896 // 2 + 14  # 4.125 bits
    assert row_bytes(576, 4) == 576 // 2 + 18  # 4.25
    assert row_bytes(896, 6) == 896 * 6 // 8 + 14
    with pytest.raises(OptionError, match="32 does not divide 100"):
        block_of(100)
    with pytest.raises(OptionError, match="of 4, 5, 6, 8 or 16 bits, not 3"):
        turner(3, PLAIN)


def test_huge_and_nothing() -> None:
    plain = PlainTurner(4)
    for value in (0.0, 3e38, 1e-30):
        assert torch.isfinite(plain.sum([plain.pack(torch.full((1, 64), value) * 1e-6)], 64)).all()
