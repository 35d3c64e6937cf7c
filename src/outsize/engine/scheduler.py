"""Runs requests on an opened model, step by step: one alone, or many gathered into one ragged batch.

`drive` is the loop. `Scheduler` holds what requests share (weights, adapters, the memory that the plan gave)
and changes it within steps alone, which threads take in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch

from outsize.draft.load import Drafting
from outsize.draft.step_time import StepTimes
from outsize.engine.decode import decode
from outsize.engine.reply import Reply, Usage, account
from outsize.engine.request import Counts, Request
from outsize.engine.step_lock import StepLock
from outsize.errors import OptionError
from outsize.forward.forward import Forward
from outsize.forward.full import full, is_narrow
from outsize.forward.span import Out, Span
from outsize.kv.kv import KV
from outsize.log import warn
from outsize.model.lora import Adapter
from outsize.model.transformer import Transformer
from outsize.options import Options
from outsize.plan.placement import Placement
from outsize.sampling.sample import Sampler
from outsize.storage.stats import IOStats
from outsize.system import memory

Flow = Generator[Span, Out, None]
T = TypeVar("T")


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


class Scheduler:
    """Runs requests on one opened model, for any number of threads. After an exception in the middle of a
    step, the next step finds everything as it must be."""

    def __init__(
        self,
        name: str,
        transformer: Transformer,
        placement: Placement,
        drafting: Drafting,
        forward: Forward = full,
    ) -> None:
        self.name, self.placement, self.drafting = name, placement, drafting
        self._forward = forward
        self.adapters: dict[str, Adapter] = {}
        self.given_up = 0  # bytes of weights that were resident at first, and had to go
        self._transformer: Transformer | None = transformer
        self._watch = memory.Watch(placement.budget)
        self._lock = StepLock(name, partial(_restore, transformer, drafting))
        self._end = transformer.loaded.close_with(self)
        memory.promise(self, placement.later)

    @property
    def transformer(self) -> Transformer:
        """The network. Raises ClosedError, ForkError."""
        self.check()
        assert self._transformer is not None
        return self._transformer

    def check(self) -> None:
        """Raises ClosedError, ForkError."""
        self._lock.check()

    def take(self, step: Callable[[], T]) -> T:
        """Do something alone with the weights, between two steps. Raises BusyError, ClosedError."""
        return self._lock.take(step)

    def close(self) -> None:
        """Release weights, threads, files and memory, once a step that another thread is in has ended."""
        if self._transformer is not None:
            self._lock.close(self._end)
            self.drafting.close()
            self.adapters.clear()
        self._transformer = None
        memory.promise(self, 0)
        memory.trim()

    def adapter(self, name: str | None) -> Adapter | None:
        """Raises OptionError for a name that is not loaded."""
        if name is not None and name not in self.adapters:
            known = ", ".join(self.adapters) or "none is loaded"
            raise OptionError(
                f"adapter {name!r} is not known: {known}; --adapter NAME=PATH loads one"
            )
        return None if name is None else self.adapters[name]

    def drive(self, requests: Sequence[Request], options: Options) -> Iterator[None]:
        """Run requests together to their ends, yielding after each step."""
        flows = [self._flow(request, options, len(requests) - 1) for request in requests]
        kvs = [request.kv for request in requests]
        steps = drive(self.transformer, flows, kvs, self.drafting.step_times, self._forward)
        while self.take(partial(self._step, steps, requests)):
            yield

    def _step(self, steps: Iterator[None], requests: Sequence[Request]) -> bool:
        """False if there was none any more."""
        if next(steps, steps) is steps:
            return False
        for request in requests:
            request.known = min(len(request.seq.tokens) - 1, request.kv.length)
        self._keep_budget()
        return True

    def _flow(self, request: Request, options: Options, others: int) -> Flow:
        seed = options.seed if request.seed is None else request.seed
        assert seed is not None
        sampler = Sampler(options, seed)
        drafts, adapter = self.drafting.new(sampler, others), self.adapter(request.adapter)
        return decode(request.seq, drafts, sampler, request.drafts, request.cached, adapter)

    def _keep_budget(self) -> None:
        """Drop resident weights if others need the memory, or we have more than was planned."""
        if excess := self._watch.excess():
            self.give_up(excess, f"memory is short by {excess / 1e6:,.0f} MB")

    def give_up(self, size: int, why: str) -> None:
        """Drop `size` bytes of resident weights, between two steps: they are read from disk from now on."""
        if freed := self.transformer.shrink(size):
            self.given_up += freed
            warn(
                f"{why}: {freed / 1e6:,.0f} MB of weights are read from disk from now on, which is slower"
            )

    def counts(self) -> Counts:
        """What has been read and waited for so far. Raises ClosedError."""
        loaded = self.transformer.loaded
        stats = loaded.stats + loaded.expert_stats, loaded.expert_stats + IOStats()
        return Counts(*stats, *self.transformer.steps)

    @property
    def bytes_read(self) -> int:
        """Of weights, since the model was opened. Raises ClosedError."""
        loaded = self.transformer.loaded
        return loaded.stats.bytes_read + loaded.expert_stats.bytes_read

    def reply(self, request: Request, options: Options, started: float, before: Counts) -> Reply:
        """The reply of a run that has ended, or was interrupted, with its usage statistics."""
        size, threads = self.placement.budget, torch.get_num_threads()
        context = self.placement.context
        shown = {**options.to_json(), "context": context, "threads": threads, "memory": size}
        tables = self.transformer.loaded.tables
        cached = not all(table.is_direct for table in tables)
        return account(request, self.name, shown, Usage(started, before, self.counts(), cached))


def _restore(transformer: Transformer, drafting: Drafting) -> None:
    """After a step that an exception broke off."""
    transformer.restore()
    drafting.restore()
