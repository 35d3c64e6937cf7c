"""The step loop: gathers a span of every live sequence into one ragged batch, and runs it with a forward."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence

from outsize.draft.step_time import StepTimes
from outsize.forward.forward import Forward
from outsize.forward.full import full, is_narrow
from outsize.forward.span import Out, Span
from outsize.kv.kv import KV
from outsize.model.transformer import Transformer

Flow = Generator[Span, Out, None]


def drive(
    model: Transformer,
    flows: Sequence[Flow],
    kvs: Sequence[KV],
    times: StepTimes | None = None,
    forward: Forward = full,
) -> Iterator[None]:
    """Run flows to their ends, yielding after each step. A finished flow leaves the batch. `times` learns
    how long steps took that had no prompt to run; `forward` runs the spans of a step."""
    waiting = [
        (flow, kv, span) for flow, kv in zip(flows, kvs, strict=True) for span in _first(flow)
    ]
    while waiting:
        started, spans = time.perf_counter(), [span for _, _, span in waiting]
        waited, asked = model.waited_s, model.asked
        narrow = all(is_narrow(span) for span in spans)
        with model.threads.narrow(narrow):
            outs = forward(model, spans, [kv for _, kv, _ in waiting])
            answered = zip(waiting, outs, strict=True)
            waiting = [(flow, kv, s) for (flow, kv, _), out in answered for s in _next(flow, out)]
        if times is not None and narrow:
            rows, masked = sum(s.num_rows for s in spans), any(s.masks is not None for s in spans)
            seconds = time.perf_counter() - started
            waited_s = min(seconds, model.waited_s - waited)
            times.step(rows, masked, seconds, waited_s, model.asked - asked)
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
