"""The simulator's programs say what the engine does: of each rank the same messages, in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from experiments.parallel.machines import size_of
from outsize.engine.model import Model
from outsize.forward.full import full
from outsize.forward.lead import Lead, follow
from outsize.forward.span import Span
from outsize.parallel.des import Compute, Op, Program, Receive, Send
from outsize.parallel.dropped import Drop
from outsize.parallel.points import Points, parse_dropped
from outsize.parallel.programs import Layer, Prompt, Tensor, relay
from outsize.parallel.spec import parse_parallel
from outsize.parallel.transport import Buffer, Sending, Threads, threads
from tests.golden import tiny
from tests.parallel.sharded import Rank, opened, shards_of


class Noted(Threads):
    """Keeps what is sent and received."""

    def __init__(self, inner: Threads) -> None:
        vars(self).update(vars(inner))
        self.ops: list[Op] = []

    def send(self, to: int, out: Buffer) -> Sending:
        self.ops.append(Send(to, len(out)))
        return super().send(to, out)

    def receive(self, of: int, into: Buffer) -> None:
        super().receive(of, into)
        self.ops.append(Receive(of, len(into)))


def messages(program: Program) -> list[Op]:
    return [op for op in program if not isinstance(op, Compute)]


def apart(ops: Sequence[Op]) -> tuple[list[Op], list[Op]]:
    """What is sent and what is received, which threads of their own do."""
    return [o for o in ops if isinstance(o, Send)], [o for o in ops if isinstance(o, Receive)]


def run_step(
    case: tuple[str, str, Sequence[float]], tokens: int, open_tiny: Callable[..., Model]
) -> list[list[Op]]:
    """What each rank sends and receives of a step of a fresh sequence."""
    family, parallel, speeds = case
    spec = parse_parallel(parallel)
    points = Points(Drop(frozenset(parse_dropped(spec.drop))), {}, spec.bits)
    packs = shards_of(open_tiny(family, "q4_0").pack, speeds, spec.way)
    noted = [Noted(t) for t in threads(len(speeds))]
    seen: dict[int, list[Op]] = {}

    def run(rank: Rank) -> None:
        rank.model.chunk, transport = 32, noted[rank.number]
        if rank.number:
            follow(rank.model, transport)
            return
        lead = rank.model.leader = Lead(transport)
        full(rank.model, [Span(0, (tiny.TOKENS * 4)[:tokens])], [rank.model.new_kv()])
        seen[0] = [*transport.ops]
        lead.end()
        rank.model.leader = None

    with opened(packs, transports=noted, points=lambda _: points) as on_all:
        on_all(run)
    end = 2  # the last frame, and its answer
    return [seen[0], *(t.ops[:-end] for t in noted[1:])]


@pytest.mark.parametrize("speeds", [(2.0, 1.0), (3.0, 1.0, 1.5)])
@pytest.mark.parametrize("tokens", [100, 20])
def test_a_relay(tokens: int, speeds: Sequence[float], open_tiny: Callable[..., Model]) -> None:
    found = run_step(("qwen2+wide", "relay", speeds), tokens, open_tiny)
    prompt = Prompt(1.0, 1.0, tiny.LAYERS, 0, 4 * tiny.WIDTH)
    for rank, ops in enumerate(found):
        said = relay(prompt, tokens, rank, len(speeds), 32)
        assert apart(ops) == apart(messages(said))


@pytest.mark.parametrize(
    "way",
    [
        "tensor:cut=sum", "tensor:cut=sum,bits=4", "tensor:cut=sum,attention=heads", "tensor:drop=0+2",
    ],
)  # fmt: skip
def test_a_token(way: str, open_tiny: Callable[..., Model]) -> None:
    found = run_step(("llama+wide", way, (2.0, 1.0)), 1, open_tiny)
    spec, d = parse_parallel(way), open_tiny("llama+wide", "q4_0").pack.description
    whole, dropped = spec.way.attention == "whole", parse_dropped(spec.drop)
    tensor = Tensor(d.num_layers, Layer(1.0, 1.0), size_of(way, d), whole, dropped)
    for rank, ops in enumerate(found):
        assert ops == messages(tensor.token(rank, 2))
