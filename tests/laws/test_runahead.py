"""Laws of a chain of ranks that share a prompt (KV-Runahead): logits and caches have the bits of one rank,
for any cuts; what goes over the wire is what the formula says; what is not shared runs on the leader.

Ranks are threads here; processes are in tests/parallel/test_processes.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from outsize.engine.model import Model
from outsize.errors import OptionError, PeerError, UnsupportedError
from outsize.forward import chain_costs, runahead
from outsize.forward.full import full
from outsize.forward.runahead import Chain
from outsize.forward.span import Span
from outsize.kv.kv import KV
from outsize.model.transformer import Transformer
from outsize.parallel.cuts import Choice, Cuts, whole
from outsize.parallel.split import Ranks, Way, split
from outsize.parallel.transport import Threads, threads
from tests.golden import tiny
from tests.parallel.sharded import Rank, opened

CHUNK = 32
LONG = (tiny.TOKENS * 8)[:300]
FAMILIES = ("llama+wide", "qwen2+wide", "qwen3+wide", "gemma3+wide", "olmoe", "falcon")
Found = tuple[Tensor, list[Tensor]]


def chained(
    model: Model,
    choose: Callable[[int, int, int], Cuts | None],
    run: Callable[[Chain, Transformer], Found],
    world: int = 2,
    transports: Sequence[Threads] = (),
) -> Found:
    """What the leader gets."""
    found = list(transports or threads(world))

    def one(rank: Rank) -> Found | None:
        transport = found[rank.number]
        rank.model.chunk = CHUNK
        if rank.number:
            runahead.follow(rank.model, transport)
            return None
        chain_costs.hear(rank.model, transport)
        lead = Chain(transport, choose)
        try:
            return run(lead, rank.model)
        finally:
            lead.end()

    with opened([model.pack] * world, transports=found) as on_all:
        got = on_all(one)[0]
    assert got is not None
    return got


def alone(model: Model, run: Callable[[Chain, Transformer], Found]) -> Found:
    """The same on one rank."""
    before, model.transformer.chunk = model.transformer.chunk, CHUNK
    try:
        return run(Chain(threads(1)[0], lambda *_: None), model.transformer)
    finally:
        model.transformer.chunk = before


def layers(kv: KV) -> list[Tensor]:
    return [kv.entries(layer).clone() for layer in range(len(kv.positions))]


def prompts(lead: Chain, model: Transformer) -> Found:
    """A prompt, tokens after it, a second turn, and a copy of some of it that goes on otherwise."""
    kv, other, rows = model.new_kv(), model.new_kv(), []
    for start, end in ((0, 200), (200, 201), (201, 206), (206, 300)):
        (out,) = lead(model, [Span(start, LONG[start:end], 2 if end - start > 1 else 1)], [kv])
        rows.append(out.logits_KV)
    other.copy_from(kv, 70)
    both = [Span(70, LONG[:150], 1), Span(300, LONG[:3], 1)]
    rows += [out.logits_KV for out in lead(model, both, [other, kv])]
    return torch.cat(rows), [*layers(kv), *layers(other)]


def same(a: Found, b: Found) -> None:
    assert torch.equal(a[0], b[0])
    for one, two in zip(a[1], b[1], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_gives_the_bits_of_one(
    family: str, world: int, open_tiny: Callable[..., Model]
) -> None:
    model, dice = open_tiny(family, "bf16" if family == "olmoe" else "q4_0"), random.Random(world)
    asked = []

    def any_cuts(start: int, units: int, unit: int) -> Cuts:
        asked.append(units)
        return whole(units, [dice.random() + 0.05 for _ in range(world)])

    same(chained(model, any_cuts, prompts, world), alone(model, prompts))
    assert len(asked) >= 2, "prompts were shared"


def test_caches_in_eight_bits(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny("qwen2+wide", "q4_0")

    def run(lead: Chain, transformer: Transformer) -> Found:
        transformer.kv = "int8"
        try:
            return prompts(lead, transformer)
        finally:
            transformer.kv = "auto"

    one = alone(model, run)
    found = threads(2)

    def each(rank: Rank) -> Found | None:
        rank.model.chunk, rank.model.kv = CHUNK, "int8"
        if rank.number:
            runahead.follow(rank.model, found[1])
            return None
        chain_costs.hear(rank.model, found[0])
        lead = Chain(found[0], lambda _, units, __: whole(units, (3, 1)))
        got = run(lead, rank.model)
        lead.end()
        return got

    with opened([model.pack] * 2, transports=found) as on_all:
        got = on_all(each)[0]
    assert got is not None
    same(got, one)


@pytest.mark.parametrize("shares", [(1, 1), (2, 5), (1, 2, 3), (3, 1, 1)])
def test_what_goes_over_the_wire(
    shares: Sequence[int], open_tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C * E numbers of each layer for each token up to a rank's last one, to the next rank."""
    monkeypatch.setattr(runahead, "PIECE", 50)
    model, world = open_tiny("llama+wide", "q4_0"), len(shares)
    transports, before = threads(world), list[int]()

    def run(lead: Chain, transformer: Transformer) -> Found:
        before.extend(t.wire.sent for t in transports)
        (out,) = lead(transformer, [Span(0, LONG)], [transformer.new_kv()])
        assert sum(lead.cuts) == len(LONG)
        before.extend(lead.cuts)
        return out.logits_KV, []

    chained(model, lambda _, units, __: whole(units, shares), run, world, transports)
    at, cuts = before[:world], before[world:]
    d = model.pack.description
    each = d.num_layers * 2 * d.num_kv_heads * d.head_dim * 2
    end = 0
    for place, rank in enumerate([*range(1, world)]):
        end += cuts[place]
        assert transports[rank].wire.sent - at[rank] == end * each + len("ended")
        messages = d.num_layers * -(-end // 50)
        assert transports[rank].wire.messages >= messages


def test_what_a_chain_leaves_to_its_leader(open_tiny: Callable[..., Model]) -> None:
    """Short spans, more logits than its part has, and a prompt for which sharing does not pay."""
    model, asked = open_tiny("llama+wide", "q4_0"), list[int]()

    def never(start: int, units: int, unit: int) -> None:
        asked.append(units)

    def run(lead: Chain, transformer: Transformer) -> Found:
        kv, rows = transformer.new_kv(), []
        for start, end, want in ((0, 20, 1), (20, 100, 1), (100, 104, 4)):
            rows += [
                o.logits_KV for o in lead(transformer, [Span(start, LONG[start:end], want)], [kv])
            ]
        lead.choose = lambda _, units, __: whole(units, (1, 1))
        rows += [o.logits_KV for o in lead(transformer, [Span(104, LONG[104:300], 196)], [kv])]
        assert lead.cuts == ()
        return torch.cat(rows), layers(kv)

    same(chained(model, never, run), alone(model, run))
    assert asked == [4]


def test_a_lost_rank_ends_the_chain(open_tiny: Callable[..., Model]) -> None:
    model, found = open_tiny("llama+wide", "q4_0"), threads(2)

    def one(rank: Rank) -> None:
        rank.model.chunk = CHUNK
        if rank.number:
            chain_costs.tell(rank.model, found[1])
            found[1].close()
            return
        chain_costs.hear(rank.model, found[0])
        lead = Chain(found[0], lambda _, units, __: whole(units, (1, 1)))
        kv = rank.model.new_kv()
        with pytest.raises(PeerError, match="rank 1 has left"):
            lead(rank.model, [Span(0, LONG)], [kv])
        with pytest.raises(PeerError, match=r"no longer run together \(rank 1 has left\)"):
            lead(rank.model, [Span(0, LONG)], [kv])
        (out,) = lead(rank.model, [Span(0, LONG[:5])], [kv])  # goes on alone
        (due,) = full(rank.model, [Span(0, LONG[:5])], [rank.model.new_kv()])
        assert torch.equal(out.logits_KV, due.logits_KV)

    with opened([model.pack] * 2, transports=found) as on_all:
        on_all(one)


def test_costs_are_measured(open_tiny: Callable[..., Model]) -> None:
    model, found = open_tiny("llama+wide", "q4_0"), threads(3)

    def one(rank: Rank) -> float:
        rank.model.chunk = CHUNK
        if rank.number:
            chain_costs.tell(rank.model, found[rank.number])
            return 0.0
        costs = chain_costs.hear(rank.model, found[0])
        assert costs.prompt.linear_s > 0
        assert len(costs.speeds) == 3
        assert costs.speeds[0] == 1
        cuts = Choice("auto", costs)(0, 10, CHUNK)
        assert cuts is None or sum(cuts) == 10
        return costs.link.bytes_per_s

    with opened([model.pack] * 3, transports=found) as on_all:
        assert on_all(one)[0] > 0


def test_what_a_chain_cannot_share(open_tiny: Callable[..., Model]) -> None:
    pack = open_tiny("qwen3_next", "bf16").pack
    with pytest.raises(UnsupportedError, match="keeps states of sequences"):
        split("it", pack.description, pack.tables, Ranks((1.0, 1.0)), Way("whole"))


def test_shares_are_one_for_each_rank(folder_of: Callable[[str], Path]) -> None:
    import outsize

    with pytest.raises(OptionError, match=r"cuts=0.5/0.3/0.2 gives 3 shares of a prompt.*2 ranks"):
        outsize.load(
            str(folder_of("llama+wide")), ranks=2, parallel="runahead:cuts=0.5/0.3/0.2", quiet=True
        )
