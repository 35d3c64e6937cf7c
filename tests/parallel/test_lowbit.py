"""Low-bit sums over ranks: what each codec says, the same bits on all ranks, bytes as the formula has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from outsize.kernels.plain import PLAIN
from outsize.kernels.turned import PlainTurner, row_bytes, turner
from outsize.parallel.collective import Point
from outsize.parallel.exact import Exact
from outsize.parallel.lowbit import LowBit, Turned
from outsize.parallel.static import Ranges, Static, Table
from outsize.parallel.transport import Transport, threads
from tests.parallel.ranks import on_all
from tests.parallel.test_exact import parts_of

AT, OTHER = Point(0, "attention"), Point(1, "ffn")


def low(t: Transport, bits: int = 4, least: int = 1) -> LowBit:
    codec = Turned(turner(bits, PLAIN))
    return LowBit(Exact(t), lambda at: codec if at == AT else None, least)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize(("world", "rows"), [(1, 2), (2, 1), (2, 200), (3, 5)])
def test_the_sum_of_what_was_packed(world: int, rows: int, bits: int) -> None:
    parts, plain, ranks = (
        parts_of(world, rows, 192, torch.bfloat16),
        PlainTurner(bits),
        threads(world),
    )
    sums = on_all(ranks, lambda t: low(t, bits).sum(parts[t.rank], AT).wait())
    wanted = plain.sum([plain.pack(p) for p in parts], 192)
    assert all(torch.equal(got, wanted) for got in sums)
    for t in ranks:
        assert t.wire.sent == (world - 1) * rows * row_bytes(192, bits)
        assert t.wire.messages == world - 1


@pytest.mark.parametrize("world", [3, 4])
def test_long_spans_of_several_ranks_go_by_two_steps(world: int) -> None:
    rows = 24 * world
    parts, plain, ranks = parts_of(world, rows, 192, torch.bfloat16), PlainTurner(6), threads(world)
    sums = on_all(ranks, lambda t: low(t, 6).sum(parts[t.rank], AT).wait())
    turned = plain.sum([plain.pack(p) for p in parts], 192, turned=True)
    wanted = plain.sum([plain.pack(turned, turned=True)], 192)
    assert all(torch.equal(got, wanted) for got in sums)
    share = rows // world * row_bytes(192, 6)
    assert [t.wire.sent for t in ranks] == [2 * (world - 1) * share] * world


def test_points_without_a_codec_and_short_spans_are_exact() -> None:
    parts = parts_of(2, 70, 64, torch.bfloat16)

    def run(t: Transport) -> list[Tensor]:
        both = low(t, least=64)
        return [
            both.sum(parts[t.rank], OTHER).wait(),
            both.sum(parts[t.rank][:63], AT).wait(),
            both.gather(parts[t.rank], AT, (64, 64)).wait(),
            both.sum(parts[t.rank], AT).wait(),
        ]

    exact = parts[0].float() + parts[1].float()
    for other, short, joined, packed in on_all(threads(2), run):
        assert torch.equal(other, exact)
        assert torch.equal(short, exact[:63])
        assert torch.equal(joined, torch.cat(parts, dim=1))
        assert not torch.equal(packed, exact)


def table(world: int, width: int, seen: list[Tensor]) -> Table:
    ranges = Ranges(world, width)
    for rank, part in enumerate(seen):
        ranges.see(rank, part)
    return ranges.table(share=16)


@pytest.mark.parametrize("width", [96, 112])  # the second: an odd number of nibbles
def test_static(width: int) -> None:
    parts = parts_of(3, 4, width, torch.bfloat16)
    for part in parts:
        part[:, 5] *= 50
        part[:, 77] *= 50
    known = table(3, width, parts)
    kept = known.kept_K.tolist()
    assert {5, 77} <= set(kept)
    assert len(kept) == width // 16
    ranks = threads(3)
    sums = on_all(
        ranks,
        lambda t: LowBit(Exact(t), lambda at: Static(t.rank, {AT: known})).sum(parts[t.rank], AT),
    )
    exact = torch.stack([p.float() for p in parts]).sum(0)
    for pending in sums:
        got = pending.wait()
        assert torch.equal(got, sums[0].wait())
        assert torch.equal(got[:, kept], exact[:, kept])
        assert bool(((got - exact).abs() <= known.step_PD.sum(0) / 2 + 1e-3).all())
    size = -(-(width - len(kept)) // 2) + 2 * len(kept)
    assert [t.wire.sent for t in ranks] == [2 * 4 * size] * 3
    codecs = [Static(rank, {AT: known}) for rank in range(3)]
    alone = [codec.pack(part[:1], AT) for codec, part in zip(codecs, parts, strict=True)]
    assert torch.equal(codecs[0].sum(alone, width, AT), sums[0].wait()[:1])


def test_static_codes() -> None:
    """Every code from -8 to 7 comes back; what is beyond saturates."""
    known = Table(torch.full((1, 33), 0.5), torch.tensor([32]))
    codec = Static(0, {AT: known})
    x = torch.cat([torch.arange(-8, 8) * 0.5, torch.tensor([-9.0] * 8 + [9.0] * 8 + [3.14])])[None]
    got = codec.sum([codec.pack(x, AT)], 33, AT)
    assert torch.equal(got[0, :16], x[0, :16])
    assert got[0, 16:32].tolist() == [-4.0] * 8 + [3.5] * 8
    assert float(got[0, 32]) == float(torch.tensor(3.14).bfloat16())


def test_ranges_move_slowly_and_begin_at_the_data() -> None:
    ranges = Ranges(2, 16)
    ranges.see(0, torch.full((2, 16), 7.0))
    ranges.see(1, torch.full((2, 16), -70.0))
    ranges.see(0, torch.full((2, 16), 107.0))
    step = ranges.table(16).step_PD
    assert step[:, 0].tolist() == pytest.approx([8 / 7, 10.0])


def test_the_paper_against_turning() -> None:
    """Where the same few features are large, both beat one step for all; turning needs no calibration."""
    made = torch.Generator().manual_seed(3)
    scale = torch.ones(192)
    scale[[3, 90, 150]] = 30
    seen, fresh = (
        [torch.randn(256, 192, generator=made) * scale for _ in range(2)] for _ in range(2)
    )
    ranges = Ranges(2, 192)
    for rank, part in enumerate(seen):
        ranges.see(rank, part)
    known, exact = ranges.table(), fresh[0] + fresh[1]
    sums = on_all(
        threads(2),
        lambda t: (
            LowBit(Exact(t), lambda at: Static(t.rank, {AT: known})).sum(fresh[t.rank], AT).wait()
        ),
    )
    static = float((sums[0] - exact).norm() / exact.norm())
    plain = PlainTurner(4)
    turned = float((plain.sum([plain.pack(p) for p in fresh], 192) - exact).norm() / exact.norm())
    assert 0 < static < 0.1
    assert 0 < turned < 0.2
