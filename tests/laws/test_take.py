"""Cut law: some rows and inputs of an encoded matrix decode to those of the whole, and rows that are cut
compute the bits that they have in the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outsize.encoding.find import ENCODINGS, encoding
from outsize.errors import UnsupportedError
from outsize.kernels.backend import Backend
from outsize.kernels.find import native_in
from outsize.kernels.plain import PLAIN

ROWS = torch.cat([torch.arange(16, 64), torch.arange(144, 192)])
WIDTH = 768  # every encoding has cuts within


@pytest.fixture(scope="module", params=["plain", "native"])
def kernel(request: pytest.FixtureRequest, home: Path) -> Backend:
    if request.param == "plain":
        return PLAIN
    return native_in(home / "native") or pytest.skip("no C compiler here")


@pytest.mark.parametrize("name", ENCODINGS)
def test_what_is_taken_is_the_whole_s(name: str, kernel: Backend) -> None:
    torch.manual_seed(5)
    e = encoding(name, kernel)
    fields = e.encode(torch.randn(200, WIDTH))
    whole, step = e.decode(fields)[:200], e.step(WIDTH)[1]
    assert WIDTH % step == 0
    for first, last in ((0, step), (step, WIDTH), (0, WIDTH)):
        columns = e.take(fields, None, (slice(first, last),))
        assert torch.equal(e.decode(columns)[:200], whole[:, first:last])
        both = e.take(fields, ROWS, (slice(first, last),))
        assert torch.equal(e.decode(both)[: len(ROWS)], whole[ROWS, first:last])
        specs = e.specs(len(ROWS), last - first)
        assert {k: (f.dtype, tuple(f.shape)) for k, f in both.items()} == {
            k: (s.dtype, s.shape) for k, s in specs.items()
        }
    rows = e.take(fields, ROWS, None)
    x = torch.randn(70, WIDTH).to(torch.float32 if name == "fp32" else torch.bfloat16)
    for count, wide in ((1, False), (5, False), (70, True)):
        if wide or name not in ("fp32", "bf16"):  # rows of floats are torch's in narrow steps
            whole_TN = e.linear(x[:count], fields, wide)[:, :200]
            assert torch.equal(e.linear(x[:count], rows, wide)[:, : len(ROWS)], whole_TN[:, ROWS])


@pytest.mark.parametrize("name", [n for n, e in ENCODINGS.items() if e.step(WIDTH) != (1, 1)])
def test_a_cut_within_a_step_is_refused(name: str) -> None:
    e = ENCODINGS[name]
    fields, (rows, inputs) = e.encode(torch.randn(64, WIDTH)), e.step(WIDTH)
    with pytest.raises(UnsupportedError, match=f"{name} cut what is stored together: multiples of"):
        e.take(fields, None, (slice(inputs // 2, WIDTH),))
    if rows > 1:
        with pytest.raises(UnsupportedError, match=f"{name} cut its tiles: multiples of 16 rows"):
            e.take(fields, torch.arange(8, 24), None)
