"""Drives flows: one alone, or many gathered into one ragged batch a step."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from outsize.cache.kv import KV
from outsize.forward.full import full
from outsize.forward.span import Out, Span
from outsize.model.transformer import Transformer

Flow = Generator[Span, Out, None]


def drive(model: Transformer, flows: Sequence[Flow], kvs: Sequence[KV]) -> Iterator[None]:
    """Run flows to their ends, yielding after each step. A finished flow leaves the batch."""
    waiting = [
        (flow, kv, span) for flow, kv in zip(flows, kvs, strict=True) for span in _first(flow)
    ]
    while waiting:
        outs = full(model, [span for _, _, span in waiting], [kv for _, kv, _ in waiting])
        answered = zip(waiting, outs, strict=True)
        waiting = [(flow, kv, s) for (flow, kv, _), out in answered for s in _next(flow, out)]
        yield


def _first(flow: Flow) -> list[Span]:
    """The flow's first span, if it has one."""
    return [span] if (span := next(flow, None)) is not None else []


def _next(flow: Flow, out: Out) -> list[Span]:
    """The flow's next span, if it goes on."""
    try:
        return [flow.send(out)]
    except StopIteration:
        return []
