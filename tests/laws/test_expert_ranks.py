"""Laws of experts by rank: each rank computes its own experts of each layer; equal to rounding, the same bits
on all ranks, rows do not see their company, and no rank ever reads an expert of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from outsize.engine.model import Model
from outsize.errors import OptionError, UnsupportedError
from outsize.forward.full import hidden
from outsize.forward.span import Span
from outsize.pack.format import Pack
from outsize.parallel.split import Ranks, Way, split
from outsize.parallel.transport import threads
from outsize.weights.open_pack import LoadPlan
from outsize.weights.residency import Share
from tests.golden import tiny
from tests.laws.test_parallel import alike, alone, batch, half, near, script
from tests.parallel.sharded import opened

CASES = [
    ("olmoe", "q4_0", 2),
    ("olmoe", "fp32", 3),
    ("gpt_oss", "bf16", 2),
    ("deepseek_v3", "bf16", 2),
]


@pytest.mark.parametrize(("family", "encoding", "world"), CASES)
def test_equal_to_rounding(
    family: str, encoding: str, world: int, open_tiny: Callable[..., Model]
) -> None:
    one = open_tiny(family, encoding)
    with opened([one.pack] * world, uncut="experts") as run:
        found, due = alike(run(lambda rank: script(rank.model))), script(one.transformer)
    if not torch.equal(found, due):
        near(found, due, encoding)


def few_slots(pack: Pack) -> LoadPlan:
    """As many experts in memory as a rank has of its own."""
    table = next(t for t in pack.tables if t.kind == "experts")
    plan = half(pack)
    shares = {**plan.shares, table.name: Share((), len(table.keys) // 2)}
    return LoadPlan(shares)


def test_each_rank_reads_its_own(open_tiny: Callable[..., Model]) -> None:
    """Twice the experts in memory: what has been read once stays."""
    one = open_tiny("olmoe", "q4_0")
    with opened([one.pack] * 2, plan=few_slots, uncut="experts") as run:
        alike(run(lambda rank: script(rank.model)))
        before = run(lambda rank: rank.loaded.expert_stats.misses)
        alike(run(lambda rank: script(rank.model)))
        after = run(lambda rank: rank.loaded.expert_stats.misses)
        count = len(next(t for t in one.pack.tables if t.kind == "experts").keys)
        assert before == after
        assert sum(before) <= count


@pytest.mark.parametrize("encoding", ["q4_0"])
def test_rows_do_not_see_their_company(encoding: str, open_tiny: Callable[..., Model]) -> None:
    one = open_tiny("olmoe", encoding)

    with opened([one.pack] * 2, uncut="experts") as run:
        together = alike(run(lambda rank: batch(rank.model)))[:16]
        assert torch.equal(together, alike(run(lambda rank: alone(rank.model))))


def test_what_goes_over_the_wire(open_tiny: Callable[..., Model]) -> None:
    """A layer's sum in fp32, once."""
    one, transports, tokens = open_tiny("deepseek_v3", "bf16"), threads(2), 30
    with opened([one.pack] * 2, transports=transports, uncut="experts") as run:
        run(lambda r: hidden(r.model, [(Span(0, tiny.TOKENS[:tokens]), r.model.new_kv())])[0])
    layers = len(one.pack.description.routed)
    assert 0 < layers < one.pack.description.num_layers
    for transport in transports:
        width = one.pack.description.width
        assert transport.wire.sent == layers * tokens * 4 * width
        assert transport.wire.messages >= layers


def test_what_has_no_experts(open_tiny: Callable[..., Model]) -> None:
    pack: Pack = open_tiny("llama+wide", "q4_0").pack
    speeds: Sequence[float] = (1.0, 1.0)
    with pytest.raises(OptionError, match="has no experts to share out; use --parallel tensor"):
        split("it", pack.description, pack.tables, Ranks(tuple(speeds)), Way("experts"))


def test_experts_beside_a_dense_half_are_not_shared_out(open_tiny: Callable[..., Model]) -> None:
    pack: Pack = open_tiny("gemma4+experts", "bf16").pack
    with pytest.raises(UnsupportedError, match="beside its experts"):
        split("it", pack.description, pack.tables, Ranks((1.0, 1.0)), Way("experts"))
