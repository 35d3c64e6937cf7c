"""The compiled kernels equal their plain twins, for every family, at every span length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from outsize.encoding.group import Group
from outsize.encoding.int4 import Int4
from outsize.engine.model import Model
from outsize.home import home as home_folder
from outsize.kernels import build
from outsize.kernels.find import native_in
from outsize.kernels.plain import PLAIN
from outsize.model.ffn.experts import Mixture, Router
from tests.golden import tiny
from tests.golden.test_golden import logits

# Activations are bf16: 8 bits of fraction, and a few roundings apart in a three-layer model.
TOLERANCE = 0.03
REPEATS = {*tiny.STORED, *(f for f in tiny.VARIANTS if f.endswith("+wide"))}  # tested at one length


@pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")
@pytest.mark.parametrize(
    ("family", "lengths"),
    [
        pytest.param(f, n, marks=pytest.mark.slow if f in REPEATS and n[0] < 30 else ())
        for f in (*tiny.CONFIGS, *tiny.VARIANTS)
        for n in ([1] * 20, [16, 3, 16], [30, 1, 1, 4])
    ],
)
def test_native_is_plain(family: str, lengths: list[int], open_tiny: Callable[..., Model]) -> None:
    native, plain = open_tiny(family, "bf16", True), open_tiny(family, "bf16", False)
    assert native.transformer.backend.name == "native"
    assert plain.transformer.backend is PLAIN
    with routed_alike(plain, native):
        twin, ours = logits(plain, lengths), logits(native, lengths)
    assert np.linalg.norm(ours - twin) <= TOLERANCE * np.linalg.norm(twin)


@contextmanager
def routed_alike(first: Model, second: Model) -> Iterator[None]:
    """The second model's experts are those that the first chose: a near tie would send a token to another
    expert, and all after it would differ. (Dense models have no routers.)"""
    saved = []
    for a, b in zip(first.transformer.paged_layers, second.transformer.paged_layers, strict=True):
        if not isinstance(a.resident, Mixture) or not isinstance(b.resident, Mixture):
            continue
        chosen: list[tuple[Tensor, Tensor]] = []
        saved += [(a.resident, a.resident.router), (b.resident, b.resident.router)]
        a.resident.router = Recording(a.resident.router, chosen)  # type: ignore[assignment]
        b.resident.router = Replaying(b.resident.router, chosen)  # type: ignore[assignment]
    try:
        yield
    finally:
        for mixture, router in saved:
            mixture.router = router


class Recording:
    def __init__(self, own: Router, chosen: list[tuple[Tensor, Tensor]]) -> None:
        self._own, self._chosen, self.norm = own, chosen, own.norm
        self.reads = own.reads

    def __call__(
        self, x_TD: Tensor, wide: bool, routing_bias_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self._chosen.append(self._own(x_TD, wide, routing_bias_N))
        return self._chosen[-1]


class Replaying(Recording):
    def __call__(
        self, x_TD: Tensor, wide: bool, routing_bias_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._chosen.pop(0)


@pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")
def test_decoding_kernels_are_exact(home: Path) -> None:
    compiled = native_in(home / "native")
    assert compiled is not None
    torch.manual_seed(2)
    w = torch.randn(192, 320)
    for bits in (5, 8):
        e = Group(bits, compiled)
        fields, x = e.encode(w), torch.eye(320, dtype=torch.bfloat16)
        columns = e.linear(x, fields, True).T.float()
        assert torch.equal(columns, e.decode(fields).bfloat16().float())
    fields = Int4().encode(w)
    fast = Int4(compiled).linear(torch.eye(320, dtype=torch.bfloat16), fields, True)
    assert torch.equal(fast, Int4().linear(torch.eye(320, dtype=torch.bfloat16), fields, True))


def test_without_a_compiler_the_plain_path_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.compiler() is None
    assert native_in(tmp_path / "native") is None


def test_a_failing_compiler_is_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native_in(tmp_path / "native") is None
    assert not list((tmp_path / "native").glob("*.so"))


@pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")
@pytest.mark.parametrize("shape", [(64, 32), (128, 96), (320, 576)])
def test_int4_rows_are_decoded_products_and_alone(shape: tuple[int, int], home: Path) -> None:
    """tiles.c: any number of rows gives each row the bits it has alone."""
    found = native_in(home / "native")
    assert found is not None
    torch.manual_seed(sum(shape))
    plain = Int4()
    fields = plain.encode(torch.randn(shape) * 0.1)
    w_NK, product = plain.decode(fields), Int4(found).product(fields)
    for rows in (1, 2, 5, 6, 7, 13, 25, 50):
        x = torch.randn(rows, shape[1]).bfloat16()
        y = product(x, False)
        want = x.float() @ w_NK.T
        assert (y.float() - want).norm() <= 0.005 * want.norm()
        alone = [product(row, False) for row in x.split(1)]
        assert torch.equal(torch.cat(alone), y)


@pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")
def test_int4_rows_keep_their_size_and_what_is_no_number(home: Path) -> None:
    """tiles.c: however large a row is, it has the same bits but for the exponent; rows of nothing give
    nothing, and what is no number stays visible, in its own row."""
    found = native_in(home / "native")
    assert found is not None
    torch.manual_seed(5)
    product = Int4(found).product(Int4().encode(torch.randn(128, 96) * 0.1))
    x = torch.randn(4, 96).bfloat16()
    y = product(x, False)
    for power in (-60, 40, 90):
        big = product(x * 2.0**power, False)
        assert torch.equal(big, y * 2.0**power)
    x[0], x[1, 40], x[2, 95] = 0, torch.nan, -torch.inf
    bad = product(x, False)
    assert not bad[0].any()
    assert not bad[1:3].isfinite().any()
    assert torch.equal(bad[3], y[3])


@pytest.mark.parametrize(("rows", "num", "width"), [(1, 40, 64), (3, 7, 576), (5, 96, 130)])
def test_rows_of_eight_bits_combined(rows: int, num: int, width: int) -> None:
    """Equal to the plain twin within rounding; and a row's bits are those of the rows that it uses alone."""
    kernels = native_in(home_folder() / "native")
    if kernels is None:
        pytest.skip("no C compiler on this machine")
    codes = torch.randint(-127, 128, (num, width), dtype=torch.int8)
    scale = torch.rand(num).bfloat16()
    inner = torch.randn(rows, num).bfloat16().masked_fill(torch.rand(rows, num) < 0.5, 0)
    found, plain = (b.combine(inner, codes, scale) for b in (kernels, PLAIN))
    assert torch.allclose(
        found.float(), plain.float(), rtol=0.02, atol=0.02 * float(plain.abs().max())
    )
    for row, made in zip(inner, found, strict=True):
        used = row != 0
        alone = kernels.combine(row[None, used], codes[used], scale[used])
        assert torch.equal(alone[0], made)
