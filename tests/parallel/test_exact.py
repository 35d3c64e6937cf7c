"""Exact sums and gathers, over threads: against the plain sum, to the bit."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from outsize.errors import PeerError
from outsize.parallel.collective import Point
from outsize.parallel.exact import Exact
from outsize.parallel.transport import Threads, Transport, threads
from tests.parallel.ranks import on_all

AT = Point(0, "ffn")


def parts_of(world: int, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    made = torch.Generator().manual_seed(rows * width + world)
    return [
        (torch.randn(rows, width, generator=made) * 10 ** (r - 1)).to(dtype) for r in range(world)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("rows", [1, 3, 63, 65, 200])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_a_sum_is_the_same_bits_on_all_ranks(world: int, rows: int, dtype: torch.dtype) -> None:
    parts = parts_of(world, rows, 96, dtype)
    sums = on_all(threads(world), lambda t: Exact(t).sum(parts[t.rank], AT).wait())
    wanted = parts[0].float()
    for part in parts[1:]:
        wanted = wanted + part.float()
    if world >= 3 and rows >= 64:
        wanted = wanted.to(dtype).float()  # two steps round once
    for got in sums:
        assert got.dtype is torch.float32
        assert torch.equal(got, wanted)


def test_a_rows_sum_does_not_depend_on_its_company() -> None:
    parts = parts_of(3, 40, 64, torch.bfloat16)

    def run(t: Transport) -> Tensor:
        exact = Exact(t)
        alone = [exact.sum(parts[t.rank][i : i + 1], AT).wait() for i in range(40)]
        return torch.cat(alone) - exact.sum(parts[t.rank], AT).wait()

    assert not any(got.any() for got in on_all(threads(3), run))


@pytest.mark.parametrize("widths", [(64, 64), (64, 0, 192), (1, 2, 3)])
def test_a_gather_is_the_columns_in_order(widths: tuple[int, ...]) -> None:
    whole = torch.randn(7, sum(widths)).bfloat16()
    ends = [sum(widths[:r]) for r in range(len(widths) + 1)]
    parts = [whole[:, a:b] for a, b in pairwise(ends)]
    for got in on_all(
        threads(len(widths)), lambda t: Exact(t).gather(parts[t.rank], AT, widths).wait()
    ):
        assert torch.equal(got, whole)


def test_many_in_flight_keep_their_order() -> None:
    """Long ones go by a thread, short ones after them, too; random pauses change nothing."""
    shapes = [(1, 64), (600, 128), (2, 64), (700, 128), (600, 96), (3, 64)]
    parts = [[torch.randn(s).bfloat16() for s in shapes] for _ in range(2)]

    def run(t: Transport) -> list[Tensor]:
        exact, pending = Exact(t), []
        for part in parts[t.rank]:
            time.sleep(random.random() / 200)
            pending.append(exact.sum(part, AT))
        return [p.wait() for p in pending]

    for got in on_all(threads(2), run):
        assert all(
            torch.equal(g, a.float() + b.float()) for g, a, b in zip(got, *parts, strict=True)
        )


def test_what_is_counted() -> None:
    ranks = threads(3)
    on_all(ranks, lambda t: Exact(t).sum(torch.zeros(5, 96).bfloat16(), AT).wait())
    assert [(t.wire.messages, t.wire.sent, t.wire.received) for t in ranks] == [(2, 1920, 1920)] * 3
    on_all(ranks, lambda t: Exact(t).sum(torch.zeros(96, 96).bfloat16(), AT).wait())
    assert [(t.wire.messages, t.wire.sent - 1920) for t in ranks] == [(6, 4 * 96 * 96 * 2 // 3)] * 3


def test_ranks_out_of_step_are_told() -> None:
    with pytest.raises(PeerError, match="rank 1 sent 64 bytes where 128 were to come"):
        on_all(threads(2), lambda t: Exact(t).sum(torch.zeros(1, 32 * (2 - t.rank)).bfloat16(), AT))


@pytest.mark.parametrize("rows", [1, 1000])
def test_a_rank_that_left_is_named(rows: int) -> None:
    def run(t: Transport) -> None:
        exact = Exact(t)
        exact.sum(torch.zeros(1, 64), AT).wait()
        if t.rank == 2:
            t.close()
            return
        with pytest.raises(PeerError, match="rank 2 has left") as told:
            exact.sum(torch.zeros(rows, 64), AT).wait()
        assert told.value.rank == 2

    on_all(threads(3), run)


def test_send_and_receive() -> None:
    a, b = threads(2)
    assert isinstance(a, Threads)
    a.send(1, b"one").wait()
    a.send(1, b"second").wait()
    first, second = bytearray(3), bytearray(6)
    b.receive(0, first)
    b.receive(0, second)
    assert (first, second) == (b"one", b"second")
