"""Encoding law: linear(x, f) == x @ decode(f).T within the stated tolerance, for every encoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outsize.encoding.find import ENCODINGS, encoding
from outsize.encoding.fp8 import Fp8
from outsize.encoding.plain import Encoding, slice_rows
from outsize.errors import UnsupportedError
from outsize.kernels import layouts
from outsize.kernels.backend import Backend
from outsize.kernels.find import native_in
from outsize.kernels.native import Native
from outsize.kernels.plain import PLAIN

SHAPES = [(64, 64), (192, 128), (80, 192), (48, 576)]


@pytest.fixture(scope="module")
def compiled(home: Path) -> Native | None:
    return native_in(home / "native")


@pytest.fixture(params=["plain", "native"])
def kernel(request: pytest.FixtureRequest, compiled: Native | None) -> Backend:
    if request.param == "native" and compiled is None:
        pytest.skip("no C compiler on this machine")
    return compiled if compiled is not None and request.param == "native" else PLAIN


def made(
    name: str, kernel: Backend, shape: tuple[int, int]
) -> tuple[Encoding, dict[str, torch.Tensor]]:
    torch.manual_seed(shape[0])
    e = encoding(name, kernel)
    return e, e.encode(torch.randn(shape[0], fit(e, shape[1])))


def fit(e: Encoding, width: int) -> int:
    """The width, or where an encoding has longer groups, four times that."""
    try:
        assert e.specs(64, width)
    except UnsupportedError:
        return 4 * width
    return width


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("rows", [1, 5, 16, 70])
def test_linear_is_decode(name: str, kernel: Backend, shape: tuple[int, int], rows: int) -> None:
    e, fields = made(name, kernel, shape)
    w = e.decode(fields)
    x = torch.randn(rows, w.shape[1]).to(torch.float32 if name == "fp32" else torch.bfloat16)
    exact = x.float() @ w.T
    for wide in (False, True):
        y = e.linear(x, fields, wide)
        assert y.dtype == x.dtype
        assert (y.float() - exact).norm() <= e.tolerance * exact.norm()


@pytest.mark.parametrize("name", ENCODINGS)
def test_fields_match_their_specs(name: str) -> None:
    e, fields = made(name, PLAIN, (80, 192))
    specs = e.specs(80, fit(e, 192))
    assert list(specs) == list(fields)
    for key, spec in specs.items():
        assert (tuple(fields[key].shape), fields[key].dtype) == (spec.shape, spec.dtype)
    assert e.stored_rows(fields) == e.decode(fields).shape[0] >= 80


@pytest.mark.parametrize("name", ENCODINGS)
def test_rows_are_rows_of_decode(name: str) -> None:
    e, fields = made(name, PLAIN, (192, 64))
    ids = torch.tensor([0, 191, 63, 64, 31, 32, 5])
    assert torch.equal(e.rows(fields, ids), e.decode(fields)[ids])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("fp32", 0.0),
        ("bf16", 3e-3),
        ("int8", 1.2e-2),
        ("fp8", 4e-2),
        ("int4", 0.11),
        ("group4", 0.1),
        ("group5", 0.05),
        ("group8", 6e-3),
        ("q2_k", 0.34),
        ("q3_k", 0.19),
        ("q4_0", 0.1),
        ("q4_k", 0.08),
        ("q5_1", 0.04),
        ("q6_k", 0.023),
        ("iq4_xs", 0.09),
        ("mxfp4", 0.11),
        ("nvfp4", 0.1),
        ("uint4-128-bf16", 0.11),
        ("palette2", 0.37),
        ("palette3", 0.19),
        ("palette4", 0.1),
        ("palette4-fp16", 0.1),
        ("palette6", 0.03),
    ],
)
def test_decode_of_encode(name: str, error: float) -> None:
    torch.manual_seed(1)
    w, e = torch.randn(128, 256), ENCODINGS[name]
    assert (e.decode(e.encode(w))[:128] - w).norm() <= error * w.norm()


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("wide", [False, True])
def test_gradient_reaches_the_input(name: str, wide: bool, kernel: Backend) -> None:
    e, fields = made(name, kernel, (64, 64))
    x = torch.randn(70, fit(e, 64)).to(torch.float32 if name == "fp32" else torch.bfloat16)
    x.requires_grad_(True)
    up = torch.randn(70, 64)
    (e.linear(x, fields, wide).float() * up).sum().backward()
    assert x.grad is not None
    exact = up @ e.decode(fields)
    assert (x.grad.float() - exact).norm() <= 2e-2 * exact.norm()


def test_fp8_keeps_every_code_and_scale() -> None:
    e = Fp8()
    codes = torch.randint(0, 256, (32, 320), dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0  # no number
    scale = torch.rand(32, 3) * 1e-3
    decoded = e.decode(e.from_codes(codes, scale))
    for k in (0, 127, 128, 255, 256, 319):
        column = codes[:, k].view(torch.float8_e4m3fn).float() * scale[:, k // 128]
        assert torch.equal(decoded[:, k], column)


def test_zero_rows_stay_zero() -> None:
    for e in ENCODINGS.values():
        assert not e.decode(e.encode(torch.zeros(64, fit(e, 64)))).any()


def test_int4_without_a_kernel_is_decoded_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "torch_reads_tiles", lambda: False)
    e, fields = made("int4", PLAIN, (80, 192))
    x = torch.randn(3, 192).bfloat16()
    exact = x.float() @ e.decode(fields).T
    y = e.linear(x, fields, False)
    assert (y.float() - exact).norm() <= e.tolerance * exact.norm()
    assert torch.equal(y, torch.cat([e.linear(row, fields, False) for row in x.split(1)]))


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize(("start", "stop"), [(0, 64), (64, 192), (128, 192)])
def test_sliced_rows_are_rows_of_decode(name: str, start: int, stop: int) -> None:
    e, fields = made(name, PLAIN, (192, 128))
    some = slice_rows(e.specs(192, fit(e, 128)), fields, start, stop)
    assert torch.equal(e.decode(some), e.decode(fields)[start:stop])
    assert all(f.untyped_storage().data_ptr() == fields[k].untyped_storage().data_ptr()
               for k, f in some.items())  # fmt: skip


def test_a_slice_cuts_no_block_of_rows() -> None:
    e, fields = made("int4", PLAIN, (192, 128))
    with pytest.raises(UnsupportedError, match="cut blocks of 64 rows"):
        slice_rows(e.specs(192, 128), fields, 32, 96)
