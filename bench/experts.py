"""Experts from a real disk at real sizes, routed as a recording says:
`python bench/experts.py MODEL.gguf TRACE --memory BYTES [--wrap 'COMMAND {bytes}'] [--experts SPECS]`.

The router's choices are replaced by the trace's (a prompt, then token by token), so that any weights do.
Reports tokens/s of decoding against the ceiling (bytes missed over the disk's rate in this run, or all of
it in memory), and what a replay of the same trace predicts. `--peer` times llama.cpp (mmap) at the same cap
with its own routing. One JSON object a spec.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from paging import Disk, record
from torch import Tensor

if TYPE_CHECKING:
    from outsize.caching.prefetcher import Scored
    from outsize.caching.replay.trace import Event, Trace
    from outsize.engine.model import Model
    from outsize.model.ffn.experts import Router

EVERY = 16
SPECS = "echo;lru;least_stale;lfu;echo,prefetch=previous:6"


class Forced:
    """A router whose choices are recorded ones; it computes its own, too, so that time is honest. One layer
    early it tells each choice with the chance `recall`, as a real model's gate would, else a wrong one."""

    def __init__(self, own: Router, events: list[Event], count: int, recall: float) -> None:
        self._own, self._events, self._count, self.norm = own, list(events), count, own.norm
        self._at, self._recall, self._random = 0, recall, random.Random(1)

    def __call__(
        self, x_TD: Tensor, wide: bool, routing_bias_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self._own(x_TD, wide, routing_bias_N)
        event = self._events[self._at]
        self._at += 1
        ids = torch.tensor(event.rows) - event.layer * self._count
        return ids, torch.full(ids.shape, 1 / ids.shape[1])

    def early(self, h_TD: Tensor, most: int) -> Scored:
        own = self._own.early(h_TD, most)
        if not self._recall or self._at == len(self._events):
            return own
        event, draw = self._events[self._at], self._random
        ids = [i - event.layer * self._count for i in event.rows[-1]]
        told = [i if draw.random() < self._recall else draw.randrange(self._count) for i in ids]
        return tuple((i, 1 / len(told)) for i in dict.fromkeys(told))


def force(m: Model, trace: Trace, recall: float = 0.0) -> None:
    from outsize.model.ffn.experts import Mixture

    for layer, part in enumerate(m.transformer.paged_layers[1::2]):
        assert isinstance(part.held, Mixture)
        events = [e for e in trace.events if e.layer == layer]
        part.held.router = Forced(part.held.router, events, trace.experts, recall)  # type: ignore[assignment]


def worker(a: argparse.Namespace) -> dict[str, object]:
    import outsize
    from outsize.caching.replay.trace import read
    from outsize.forward.full import full
    from outsize.forward.span import Span
    from outsize.system.memory import peak

    trace = read(Path(a.trace))
    prompt = len(trace.events[0].rows)
    tokens = max(e.number for e in trace.events if e.phase == 1) + 1
    new = min(a.new, tokens - 1)
    trace = padded(trace, prompt)
    with outsize.load(
        a.model, memory=a.memory, context=a.context, experts=a.experts, quiet=True
    ) as m:
        force(m, trace, a.recall)
        disk, kv = Disk(m), m.transformer.new_kv(a.context)
        rates, steps = [disk.rate()], []
        begun = time.perf_counter()
        full(m.transformer, [Span(0, list(range(40, 40 + prompt)))], [kv])
        first_s, before = time.perf_counter() - begun, m.counts()
        for i in range(new):
            begun = time.perf_counter()
            full(m.transformer, [Span(prompt + i, [50 + i])], [kv])
            steps.append(time.perf_counter() - begun)
            if i % EVERY == EVERY - 1:
                rates.append(disk.rate())
        t = m.counts().experts - before.experts
        slots = sum(s.ring for k, s in m.placement.shares.items() if k.startswith("experts"))
        stride = max(h.stride for h in m.pack.tables if h.kind == "experts")
        step_s, rate = sum(steps) / new, sum(rates) / len(rates)
        missed = (t.bytes_demanded + t.bytes_useful) / new
        return {
            "model": m.name, "experts": a.experts, "gate_recall": a.recall,
            "memory": m.placement.budget, "slots": slots,
            "share": round(slots / trace.size, 4), "tokens": new, "tokens_per_s": round(1 / step_s, 4),
            "step_s": round(step_s, 5), "prompt_s": round(first_s, 3), "hit_rate": round(t.hit_rate, 4),
            "missed_bytes_per_token": round(missed), "wasted_bytes": t.bytes_wasted, "ready": t.ready,
            "late": t.late, "collision": t.collision, "waited_s_per_token": round(t.waited_s / new, 5),
            "disk_bytes_per_s": [round(r) for r in rates],
            "of_ceiling": round(missed / rate / step_s, 4),
            "replayed": replayed(trace, a.experts, slots, stride, rate, step_s - t.waited_s / new, new),
            "process_bytes": m.placement.process, "peak_bytes": peak(),
        }  # fmt: skip


def padded(trace: Trace, prompt: int) -> Trace:
    """Layers whose prompt has fewer rows than others repeat their last one: a span has them all."""
    from dataclasses import replace

    events = tuple(
        replace(e, rows=(*e.rows, *[e.rows[-1]] * (prompt - len(e.rows)))) if e.phase == 0 else e
        for e in trace.events
    )
    return replace(trace, events=events)


def replayed(
    trace: Trace, spec: str, slots: int, stride: int, rate: float, busy_s: float, new: int
) -> dict[str, float]:
    """The same trace, slots and link in virtual time; computing as long as it took."""
    from outsize.caching.policy import Hints
    from outsize.caching.prefetcher import make
    from outsize.caching.replay.simulate import Link, Replay, ReplaySetup
    from outsize.caching.replay.trace import waves
    from outsize.weights.spec import parse_experts

    knobs = parse_experts(spec)
    policy = knobs.policy(slots, Hints(per_layer=trace.experts, layers=trace.layers))
    last = min(e.number for e in trace.events if e.phase == 1) + new
    events = waves([e for e in trace.events if e.number < last], policy.room)
    link = Link(rate, stride, layer_s=busy_s / trace.layers)
    ahead = make(knobs.prefetch, trace.experts)
    setup = ReplaySetup(policy, slots, link, ahead, num_experts=trace.experts)
    out = Replay(setup).run(events)[1]
    return {
        "hit_rate": round(out.stats.hit_rate, 4),
        "tokens_per_s": round(out.tokens / out.seconds, 4),
    }


def run(wrap: str, cap: int, command: Sequence[str], python: str = "") -> dict[str, object]:
    prefix = shlex.split(wrap.format(bytes=cap)) if wrap else []
    whole = [*prefix, python or sys.executable, *command]
    done = subprocess.run(whole, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    found = json.loads(last) if last.startswith("{") else {"error": done.stderr[-600:]}
    return {"cap": cap, "status": done.returncode} | found


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("trace")
    p.add_argument("--memory", type=int, required=True)
    p.add_argument("--wrap", default="")
    p.add_argument("--experts", default=SPECS, help="semicolon-separated")
    p.add_argument("--new", type=int, default=128)
    p.add_argument("--context", type=int, default=256)
    p.add_argument("--peer", action="store_true", help="llama.cpp, too, in the same sitting")
    p.add_argument(
        "--recall",
        type=float,
        default=0.0,
        help="an early gate that tells so many of the next layer's choices; 0: the random model's own",
    )
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("-o", "--output", type=Path)
    a = p.parse_args()
    if a.worker:
        print(json.dumps(worker(a)))
        return
    common = [a.model, a.trace, "--memory", str(a.memory), "--new", str(a.new)]
    common += ["--context", str(a.context), "--recall", str(a.recall), "--worker"]
    peer = [str(Path(__file__).parent / "peers" / "llamacpp.py"), a.model, "--cold", "--no-repack"]
    for _ in range(a.repeats):
        for spec in a.experts.split(";"):
            record(run(a.wrap, a.memory, [__file__, *common, "--experts", spec]), a.output)
        if a.peer:
            limits = ["--prompt-tokens", "28", "--new-tokens", "24"]
            record(run(a.wrap, a.memory, [*peer, *limits]), a.output)


if __name__ == "__main__":
    main()
