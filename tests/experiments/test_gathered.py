"""The baseline of KV-Runahead in the engine: the bits of one rank, and the bytes of its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from experiments.parallel import gathered
from outsize.engine.model import Model
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.parallel.transport import threads
from tests.golden import tiny
from tests.parallel.sharded import opened

TOKENS = (tiny.TOKENS * 8)[:240]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("family", ["llama+wide", "qwen2+wide"])
def test_all_keys_to_all_ranks(family: str, world: int, open_tiny: Callable[..., Model]) -> None:
    model = open_tiny(family, "q4_0")
    transformer, before = model.transformer, model.transformer.chunk
    transformer.chunk = len(TOKENS) // world
    kv = transformer.new_kv()
    try:
        (wanted,) = full(transformer, [Span(0, TOKENS, 1)], [kv])
    finally:
        transformer.chunk = before
    found = threads(world)
    with opened([model.pack] * world, transports=found) as on_all:
        got = on_all(lambda rank: gathered.run(rank.model, found[rank.number], TOKENS))
    assert got[0] is not None
    assert all(other is None for other in got[1:])
    out, own = got[0]
    assert torch.equal(out.logits_KV, wanted.logits_KV)
    layers = range(transformer.description.num_layers)
    assert all(torch.equal(own.entries(i), kv.entries(i)) for i in layers)
    sent = sum(kv.entries(i).nbytes for i in layers) * (world - 1)
    assert sum(transport.wire.sent for transport in found) == sent
