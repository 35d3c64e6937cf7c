"""A step: one ragged batch of spans through a forward; and the plain loop over flows, `Batch`'s twin."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence

from outsize.draft.step_time import StepTimes
from outsize.forward.forward import Forward
from outsize.forward.full import full
from outsize.forward.span import Out, Span
from outsize.kv.kv import KV
from outsize.model.transformer import Transformer

Flow = Generator[Span, Out, None]


def run(
    model: Transformer,
    spans: Sequence[Span],
    kvs: Sequence[KV],
    times: StepTimes | None = None,
    forward: Forward = full,
) -> list[Out]:
    """One step. `times` learns how long steps take that have no prompt to run."""
    started, waited, asked = time.perf_counter(), model.waited_s, model.asked
    narrow = all(span.is_narrow for span in spans)
    with model.threads.narrow(narrow):
        outs = forward(model, spans, kvs)
    if times is not None and narrow and not any(span.is_lazy for span in spans):
        rows, masked = sum(s.num_rows for s in spans), any(s.masks is not None for s in spans)
        seconds = time.perf_counter() - started
        waited_s = min(seconds, model.waited_s - waited)
        times.step(rows, masked, seconds, waited_s, model.asked - asked)
    return outs


def drive(
    model: Transformer,
    flows: Sequence[Flow],
    kvs: Sequence[KV],
    times: StepTimes | None = None,
    forward: Forward = full,
) -> Iterator[None]:
    """Run flows to their ends, yielding after each step. A finished flow leaves; none joins."""
    waiting = [
        (flow, kv, span) for flow, kv in zip(flows, kvs, strict=True) for span in first(flow)
    ]
    while waiting:
        spans, stores = [span for _, _, span in waiting], [kv for _, kv, _ in waiting]
        answered = zip(waiting, run(model, spans, stores, times, forward), strict=True)
        waiting = [(flow, kv, s) for (flow, kv, _), out in answered for s in following(flow, out)]
        yield


def first(flow: Flow) -> list[Span]:
    """The flow's first span, if it has one."""
    return [span] if (span := next(flow, None)) is not None else []


def following(flow: Flow, out: Out) -> list[Span]:
    """The flow's next span, if it goes on."""
    try:
        return [flow.send(out)]
    except StopIteration:
        return []
