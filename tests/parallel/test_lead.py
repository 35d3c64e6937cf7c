"""One rank leads, the others follow: its steps give the bits of one rank, whatever happens to its caches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from outsize.engine.model import Model
from outsize.errors import OptionError, PeerError
from outsize.forward.full import full
from outsize.forward.lead import Lead, follow
from outsize.forward.prune import parse_prefill
from outsize.forward.span import Span
from outsize.model.transformer import Transformer
from outsize.parallel.split import Way
from outsize.parallel.transport import Transport, threads
from tests.golden import tiny
from tests.laws.spans import logits
from tests.parallel.sharded import Rank, opened, shards_of


def led(model: Model, way: Way, run: Callable[[Transformer], Tensor]) -> Tensor:
    """What the leader gets; the other rank follows."""
    transports = threads(2)

    def one(rank: Rank) -> Tensor | None:
        transport: Transport = transports[rank.shard.rank]
        if rank.shard.rank:
            follow(rank.model, transport)
            return None
        lead = rank.model.leader = Lead(transport, way.attention == "whole")
        try:
            return run(rank.model)
        finally:
            lead.end()

    with opened(shards_of(model.pack, (2.0, 1.0), way), transports=transports) as on_all:
        found = on_all(one)[0]
    assert found is not None
    return found


def kept(model: Transformer) -> Tensor:
    """A prompt is kept, and others go on with copies of some of it; caches come and go."""
    prompt, rows = tiny.TOKENS[:30], []
    first = model.new_kv()
    full(model, [Span(0, prompt)], [first])
    for shared in (20, 7, 29):
        kv = model.new_kv()
        kv.copy_from(first, shared)
        rows.append(full(model, [Span(shared, prompt[shared:], 1)], [kv])[0].logits_KV)
        kv.truncate(3)
        (block,) = first.blocks(3, 5, 1)
        kv.append_block(block)
        rows.append(full(model, [Span(8, prompt[8:12], 4)], [kv])[0].logits_KV)
    rows.append(full(model, [Span(30, tiny.TOKENS[30:34], 4)], [first])[0].logits_KV)
    return torch.cat(rows)


def many(model: Transformer) -> Tensor:
    """More than fits a frame."""
    kvs = [model.new_kv() for _ in range(9)]
    spans = [Span(0, tiny.TOKENS[i : i + 20], 20) for i in range(9)]
    return torch.cat([out.logits_KV for out in full(model, spans, kvs)])


@pytest.mark.parametrize("run", [logits, kept, many])
def test_a_leader_s_steps(
    run: Callable[[Transformer], Tensor], open_tiny: Callable[..., Model]
) -> None:
    model = open_tiny("qwen2+wide", "q4_0")
    assert torch.equal(led(model, Way(), run), run(model.transformer))


def test_caches_in_eight_bits(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny("qwen2+wide", "q4_0")

    def run(transformer: Transformer) -> Tensor:
        transformer.kv = "int8"
        return kept(transformer)

    try:
        due = run(model.transformer)
        transports = threads(2)

        def one(rank: Rank) -> Tensor | None:
            rank.model.kv = "int8"
            if rank.shard.rank:
                follow(rank.model, transports[1])
                return None
            lead = rank.model.leader = Lead(transports[0])
            found = kept(rank.model)
            lead.end()
            return found

        with opened(shards_of(model.pack, (2.0, 1.0), Way()), transports=transports) as on_all:
            found = on_all(one)[0]
        assert found is not None
        assert torch.equal(found, due)
    finally:
        model.transformer.kv = "auto"


def test_what_is_not_told_is_refused(open_tiny: Callable[..., Model]) -> None:
    def lazy(model: Transformer) -> Tensor:
        span = Span(0, tiny.TOKENS[:30], prune=parse_prefill("lazy"))
        return full(model, [span], [model.new_kv()])[0].logits_KV

    model = open_tiny("llama+wide", "q4_0")
    with pytest.raises(OptionError, match="lazy prompts are not run by several ranks"):
        led(model, Way(), lazy)
    with pytest.raises(OptionError, match=r"that each rank has in part.*attention=whole"):
        led(model, Way("sum", "heads"), kept)


def test_after_a_broken_step_there_is_none(open_tiny: Callable[..., Model]) -> None:
    """A step that the leader broke off leaves the others in the middle of it."""

    class Gone(Exception):
        pass

    model, lead = open_tiny("llama+wide", "q4_0").transformer, Lead(threads(1)[0])
    span, kv = Span(0, [1, 2]), model.new_kv()
    with pytest.raises(Gone), lead.step([(span, kv)]):
        raise Gone("the disk is gone")
    with pytest.raises(PeerError, match=r"no longer run together \(the disk is gone\)"):
        lead.step([(span, kv)]).__enter__()
