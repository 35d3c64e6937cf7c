"""Laws of layers whose attention is not summed over ranks (Sync-Point Drop): all ranks have the same bits,
rows do not see their company, one sum less goes over the wire; with the others' parts as the correction's
guess a layer is the whole one.

Ranks are threads here; processes are in tests/parallel/test_processes.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from outsize.adapt.sync.ranks import opened as simulated
from outsize.engine.model import Model
from outsize.forward.full import full, hidden
from outsize.forward.span import Span
from outsize.home import home
from outsize.parallel.collective import Pending, Point
from outsize.parallel.dropped import Correction, Drop, Fit
from outsize.parallel.points import Points
from outsize.parallel.split import Way
from outsize.parallel.transport import threads
from tests.golden import tiny
from tests.laws.spans import logits
from tests.laws.test_parallel import HEADS, TWO, alike, alone, batch, script
from tests.parallel.sharded import Rank, opened, shards_of

FAMILIES = ("llama+wide", "qwen2+wide", "qwen3+wide", "llama+biases")
KEYS_SWAPPED = Way("sum", "heads", (1, 2))


def dropping(*layers: int, bits: int = 16, rank: int = 0) -> Callable[[int], Points]:
    """Points of every rank; `rank`: of corrections of random numbers."""

    def points(number: int) -> Points:
        made, dice = {}, torch.Generator().manual_seed(number)
        for layer in layers if rank else ():
            first = torch.randn(2 * tiny.WIDTH + 1, rank, generator=dice) / tiny.WIDTH
            made[layer] = Correction(first, torch.randn(rank, tiny.WIDTH, generator=dice) / rank)
        return Points(Drop(frozenset(layers), made), {}, bits)

    return points


def kl(due: Tensor, found: Tensor) -> float:
    p, q = torch.log_softmax(due.double(), 1), torch.log_softmax(found.double(), 1)
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 4])
def test_ranks_have_the_same_bits(family: str, rank: int, open_tiny: Callable[..., Model]) -> None:
    """L2: prompts, tokens, drafts and batches; and what is dropped makes a difference."""
    one = open_tiny(family, "q4_0")
    packs = shards_of(one.pack, TWO, HEADS)
    with opened(packs, points=dropping(0, 2, rank=rank)) as run:
        found = alike(run(lambda rank: script(rank.model)))
    assert 1e-3 < kl(script(one.transformer), found) < 5


def test_nothing_dropped_is_the_sum(open_tiny: Callable[..., Model]) -> None:
    one = open_tiny("qwen2+wide", "q4_0")
    packs = shards_of(one.pack, TWO, HEADS)
    with opened(packs) as run:
        due = alike(run(lambda rank: script(rank.model)))
    with opened(packs, points=dropping()) as run:
        assert torch.equal(alike(run(lambda rank: script(rank.model))), due)


@pytest.mark.parametrize("family", ["llama+biases", "qwen2+wide"])
def test_an_oracle_gives_both_sums(family: str, open_tiny: Callable[..., Model]) -> None:
    """Each rank told what the others' parts are: equal to rounding, biases and all. Without, it is not."""
    one = open_tiny(family, "fp32")
    packs, parts = shards_of(one.pack, TWO, HEADS), dict[int, Tensor]()

    class Oracle(Drop):
        def attention(
            self, layer: int, part_TD: Tensor, normed_TD: Tensor, apart: bool = False
        ) -> Tensor:
            number = next(r for r, p in parts.items() if torch.equal(p, part_TD))
            return part_TD + sum(p for r, p in parts.items() if r != number)

    def run_one(rank: Rank) -> Tensor:
        return hidden(rank.model, [(Span(0, tiny.TOKENS[:30]), rank.model.new_kv())])[0]

    def seen(rank: Rank) -> Tensor:
        """Runs as without; layer 0's parts are kept."""
        assert rank.ranks is not None
        plain = rank.ranks.sum

        def kept(part_TD: Tensor, at: Point) -> Pending:
            if at == Point(0, "attention"):
                parts[rank.number] = part_TD.clone()
            return plain(part_TD, at)

        rank.ranks.sum = kept  # type: ignore[method-assign]
        return run_one(rank)

    with opened(packs) as run:
        due = alike(run(seen))
    with opened(packs, points=lambda _: Points(Oracle(frozenset([0])))) as run:
        found = alike(run(run_one))
    with opened(packs, points=dropping(0)) as run:
        without = alike(run(run_one))
    size = due.abs().max()
    assert (found - due).abs().max() <= 1e-4 * size
    assert (without - due).abs().max() > 1e-3 * size


@pytest.mark.parametrize("rank", [0, 4])
def test_rows_do_not_see_their_company(rank: int, open_tiny: Callable[..., Model]) -> None:
    """L5."""
    one = open_tiny("qwen2+wide", "q4_0")

    with opened(shards_of(one.pack, TWO, HEADS), points=dropping(1, rank=rank)) as run:
        together = alike(run(lambda rank: batch(rank.model)))[:16]
        assert torch.equal(together, alike(run(lambda rank: alone(rank.model))))


@pytest.mark.parametrize("layers", [(), (1,), (0, 1, 2)])
@pytest.mark.parametrize("bits", [16, 4])
def test_one_message_less_for_each(
    layers: tuple[int, ...], bits: int, open_tiny: Callable[..., Model]
) -> None:
    """L6."""
    one, transports, tokens = open_tiny("qwen3+wide", "q4_0"), threads(2), 30
    points = dropping(*layers, bits=bits)
    with opened(shards_of(one.pack, TWO, HEADS), transports=transports, points=points) as run:
        run(lambda r: hidden(r.model, [(Span(0, tiny.TOKENS[:tokens]), r.model.new_kv())])[0])
    messages = 2 * tiny.LAYERS - len(layers)
    row = 2 * tiny.WIDTH if bits == 16 else tiny.WIDTH * bits // 8 + 2 * (tiny.WIDTH // 64)
    for transport in transports:
        assert transport.wire.messages == messages
        assert transport.wire.sent == messages * tokens * row


def test_bits_by_point(open_tiny: Callable[..., Model]) -> None:
    one, transports = open_tiny("qwen3+wide", "q4_0"), threads(2)
    points = Points(Drop(frozenset([1])), {"0.ffn": 4, "1.block": 8}, 16)
    with opened(
        shards_of(one.pack, TWO, HEADS), transports=transports, points=lambda _: points
    ) as run:
        alike(
            run(
                lambda r: full(r.model, [Span(0, tiny.TOKENS[:5])], [r.model.new_kv()])[0].logits_KV
            )
        )
    steps = 2 * (tiny.WIDTH // 64)
    rows = 3 * 2 * tiny.WIDTH + (tiny.WIDTH // 2 + steps) + (tiny.WIDTH + steps)
    assert transports[0].wire.sent == 5 * rows


def test_key_heads_as_they_are_given(open_tiny: Callable[..., Model]) -> None:
    """A file's cut of heads, whatever the speeds are."""
    one = open_tiny("qwen2+wide", "q4_0")
    packs = shards_of(one.pack, (5.0, 1.0), KEYS_SWAPPED)
    assert [p.description.shard.kv_heads for p in packs if p.description.shard] == [(0, 1), (1, 2)]
    with opened(packs) as run:
        assert kl(script(one.transformer), alike(run(lambda r: script(r.model)))) < 1e-3


def test_a_correction_is_fitted_in_the_engine(open_tiny: Callable[..., Model]) -> None:
    """On the text that it was fitted to it brings the answer nearer."""
    one = open_tiny("llama+wide", "q4_0")
    packs = shards_of(one.pack, TWO, HEADS)
    shards = [p.description.shard for p in packs if p.description.shard is not None]
    ids = torch.tensor([tiny.TOKENS[i : i + 30] for i in range(8)])
    with simulated(one.pack, shards, home()) as ranks:
        fits = list[Fit]()
        for fits in ranks.fit(ids, [1]):  # noqa: B007
            pass
        made = [fit.solve(32) for fit in fits]
        states = []
        for choice in (
            lambda _: Points(),
            dropping(1),
            lambda r: Points(Drop(frozenset([1]), {1: made[r]})),
        ):
            for rank in ranks.all:
                rank.sums.points = choice(rank.number)

            with ThreadPoolExecutor(2) as pool:
                states.append(alike(list(pool.map(lambda rank: logits(rank.model), ranks.all))))
    due, plain, corrected = states
    assert 0 < kl(due, corrected) < 0.7 * kl(due, plain)
