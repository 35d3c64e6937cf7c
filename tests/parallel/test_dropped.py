"""Sync-Point Drop on a small block over ranks, with the controls: an oracle, one rank, biases, and the two
wrong versions found in public code."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from outsize.errors import UnsupportedError
from outsize.parallel.collective import Point
from outsize.parallel.dropped import Correction, Drop, Fit, check, message
from outsize.parallel.exact import Exact
from outsize.parallel.transport import Transport, threads
from tests.parallel.ranks import on_all

WIDTH, INNER = 32, 96


def normed(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()


@dataclass(frozen=True)
class Block:
    """Two sub-layers cut over ranks: each rank's inner half, and biases that belong to the whole."""

    first: tuple[tuple[Tensor, Tensor], ...]  # of attention, by rank: (D, F / p), (F / p, D)
    second: tuple[tuple[Tensor, Tensor], ...]
    bias_o: Tensor
    bias_2: Tensor

    def part(self, which: str, rank: int, x: Tensor) -> Tensor:
        a, b = getattr(self, which)[rank]
        return torch.tanh(normed(x) @ a) @ b


def block(world: int) -> Block:
    made = torch.Generator().manual_seed(world)

    def cut() -> tuple[tuple[Tensor, Tensor], ...]:
        a = torch.randn(WIDTH, INNER, generator=made) / 4
        b = torch.randn(INNER, WIDTH, generator=made) / 4
        return tuple(zip(a.chunk(world, 1), b.chunk(world, 0), strict=True))

    biases = torch.randn(2, WIDTH, generator=made)
    return Block(cut(), cut(), biases[0], biases[1])


def full(t: Transport, b: Block, x: Tensor) -> Tensor:
    """Two sums."""
    exact = Exact(t)
    h = x + exact.sum(b.part("first", t.rank, x), Point(0, "attention")).wait() + b.bias_o
    return h + exact.sum(b.part("second", t.rank, h), Point(0, "ffn")).wait() + b.bias_2


def dropped(t: Transport, b: Block, x: Tensor, drop: Drop, oracle: Tensor | None = None) -> Tensor:
    """One sum."""
    part = b.part("first", t.rank, x)
    h = drop.guess(0, x, part, normed(x)) + b.bias_o
    if oracle is not None:
        h = h + oracle
    ffn = b.part("second", t.rank, h)
    return x + Exact(t).sum(message(part, ffn), Point(0, "block")).wait() + b.bias_o + b.bias_2


X = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(9))
ZERO = Drop(frozenset([0]))


@pytest.mark.parametrize("world", [2, 3])
def test_an_oracle_gives_the_block_with_two_sums(world: int) -> None:
    b = block(world)
    wanted = on_all(threads(world), lambda t: full(t, b, X))[0]
    parts = [b.part("first", r, X) for r in range(world)]

    def run(t: Transport) -> Tensor:
        rest = sum(p for r, p in enumerate(parts) if r != t.rank)
        return dropped(t, b, X, ZERO, rest)

    ranks = threads(world)
    for got in on_all(ranks, run):
        assert torch.allclose(got, wanted, atol=1e-5)
    assert [t.wire.messages for t in ranks] == [world - 1] * world  # one sum
    zero_shot = on_all(threads(world), lambda t: dropped(t, b, X, ZERO))
    assert all(torch.equal(got, zero_shot[0]) for got in zero_shot)
    assert not torch.allclose(zero_shot[0], wanted, atol=1e-2)


def test_one_rank_is_the_block_without_ranks() -> None:
    b = block(1)
    (got,) = on_all(threads(1), lambda t: dropped(t, b, X, ZERO))
    h = X + b.part("first", 0, X) + b.bias_o
    wanted = X + (b.part("first", 0, X) + b.part("second", 0, h)) + b.bias_o + b.bias_2
    assert torch.equal(got, wanted)


def distance(b: Block, run: object) -> float:
    wanted = on_all(threads(2), lambda t: full(t, b, X))[0]
    got = on_all(threads(2), run)[0]  # type: ignore[arg-type]
    return float((got - wanted).norm() / wanted.norm())


def test_wrong_versions_are_worse() -> None:
    """Biases summed by every rank; the part never added again; the feed-forward fed with the part alone."""
    b = block(2)

    def biases(t: Transport) -> Tensor:
        part = b.part("first", t.rank, X) + b.bias_o
        ffn = b.part("second", t.rank, X + part) + b.bias_2
        return X + Exact(t).sum(message(part, ffn), Point(0, "block")).wait()

    def never_again(t: Transport) -> Tensor:
        part = b.part("first", t.rank, X)
        h = X + part + b.bias_o
        ffn = b.part("second", t.rank, h)
        return h + Exact(t).sum(ffn, Point(0, "block")).wait() + b.bias_2

    def part_alone(t: Transport) -> Tensor:
        part = b.part("first", t.rank, X)
        ffn = b.part("second", t.rank, part + b.bias_o)
        return X + Exact(t).sum(message(part, ffn), Point(0, "block")).wait() + b.bias_o + b.bias_2

    right = distance(b, lambda t: dropped(t, b, X, ZERO))
    for wrong in (biases, never_again, part_alone):
        assert distance(b, wrong) > 1.2 * right
    same = on_all(threads(2), never_again)
    assert not torch.equal(same[0], same[1])  # ranks drift apart


def test_a_fitted_correction_helps_on_data_it_has_not_seen() -> None:
    """Closed form; more so the more dimensions, and full rank is ridge regression's own."""
    b, made = block(2), torch.Generator().manual_seed(4)
    base = torch.randn(6, WIDTH, generator=made)  # states that vary in few directions
    seen, fresh = (torch.randn(n, 6, generator=made) @ base for n in (3000, 400))
    fits = []
    for rank in range(2):
        fit = Fit(WIDTH)
        fit.add(normed(seen), b.part("first", rank, seen), b.part("first", 1 - rank, seen))
        fits.append(fit)

    def error(dims: int) -> float:
        total = 0.0
        for rank in range(2):
            part, other = b.part("first", rank, fresh), b.part("first", 1 - rank, fresh)
            guess = fits[rank].solve(dims)(normed(fresh), part) if dims else torch.zeros_like(other)
            total += float((guess - other).norm() / other.norm()) / 2
        return total

    none, few, all_ = error(0), error(4), error(WIDTH)
    assert none == pytest.approx(1.0)
    assert all_ < few < 0.9
    assert all_ < 0.5
    wanted = on_all(threads(2), lambda t: full(t, b, fresh))[0]
    plain = on_all(threads(2), lambda t: dropped(t, b, fresh, ZERO))[0]
    better = on_all(
        threads(2),
        lambda t: dropped(t, b, fresh, replace(ZERO, corrections={0: fits[t.rank].solve(16)})),
    )
    assert torch.equal(better[0], better[1])
    assert (better[0] - wanted).norm() < 0.7 * (plain - wanted).norm()


def test_none_dropped_is_none() -> None:
    assert 3 in Drop(frozenset([3]))
    assert 3 not in Drop()
    zero = Correction(torch.zeros(2 * WIDTH + 1, 1), torch.zeros(1, WIDTH))
    with_zero = replace(ZERO, corrections={0: zero})
    assert torch.equal(with_zero.guess(0, X, X, X), ZERO.guess(0, X, X, X))


def test_refused() -> None:
    check(1, mixture=False, post_norm=False, num_layers=2)
    for wrong, what in (
        ({"mixture": True}, "it has experts"),
        ({"post_norm": True}, "the norm of a sum"),
        ({"num_layers": 1}, "there are layers 0 to 0"),
    ):
        told = {"mixture": False, "post_norm": False, "num_layers": 2, **wrong}
        with pytest.raises(UnsupportedError, match=what):
            check(1, **told)  # type: ignore[arg-type]
