"""Experts from a real disk at real sizes, routed as a recording says, and beside llama.cpp:
`python -m experiments.caching.experts MODEL.gguf TRACE --memory BYTES [--wrap 'COMMAND {bytes}']
[--experts SPECS] [--peer] [-o FILE.jsonl]`.

The model is made if it is not there (routed.py): random weights, and a router that makes the trace's choices.
Each run is a fresh process: a prompt in one span, then token by token. Reports tokens/s of decoding against
the ceiling (bytes missed over the disk's rate in this run, or all of it in memory), the share of choices that
were the trace's, and what a replay of the same trace predicts. `--peer` runs llama.cpp in turn, with the same
ids (weights in the mapped file only, so that they can be dropped), and compares the last logits of both. One
JSON object a run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

import outsize
from experiments.caching.routed import FIRST, agreed, choices, make, prompt_of, watch
from experiments.memory.paging import Disk
from experiments.runs import HIDDEN, LLAMA, WRAP, Row, arguments, fresh, record
from outsize.caching.policy import Hints
from outsize.caching.prefetcher import make as prefetcher
from outsize.caching.replay.simulate import Link, Replay, ReplaySetup
from outsize.caching.replay.trace import Trace, read, waves
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.pack import fetch
from outsize.system.memory import peak
from outsize.weights.spec import parse_experts

EVERY = 16  # tokens after which the disk's rate is measured again
SHOWN = 64  # logits that are compared
SPECS = "echo;lru;least_stale;lfu;echo,prefetch=previous:6"
KEYS = ("decode_tokens_per_s", "prefill_tokens_per_s")


def worker(a: argparse.Namespace, trace: Trace) -> Row:
    prompt, wanted = prompt_of(trace), choices(trace)
    how = {"context": a.context, "experts": a.experts, "draft": "none", "quiet": True}
    with outsize.load(str(a.model), memory=a.memory, **how) as m:
        watched, disk, kv = watch(m, wanted, a.recall), Disk(m), m.transformer.new_kv(a.context)
        rates, steps = [disk.rate()], []
        begun = time.perf_counter()
        full(m.transformer, [Span(0, list(range(FIRST, FIRST + prompt)))], [kv])
        prompt_s, before = time.perf_counter() - begun, m.counts()
        for i in range(a.new):
            begun = time.perf_counter()
            (out,) = full(m.transformer, [Span(prompt + i, [FIRST + prompt + i])], [kv])
            steps.append(time.perf_counter() - begun)
            if i % EVERY == EVERY - 1:
                rates.append(disk.rate())
        t = m.counts().experts - before.experts
        slots = sum(s.ring for k, s in m.placement.shares.items() if k.startswith("experts"))
        stride = max(h.stride for h in m.pack.tables if h.kind == "experts")
        step_s, rate = sum(steps) / a.new, sum(rates) / len(rates)
        missed, waited_s = (t.bytes_demanded + t.bytes_useful) / a.new, t.waited_s / a.new
        link = Link(rate, stride, layer_s=(step_s - waited_s) / trace.layers)
        return {
            "engine": "outsize", "experts": a.experts, "gate_recall": a.recall,
            "memory": m.placement.budget, "slots": slots, "share": round(slots / trace.size, 4),
            "decode_tokens_per_s": round(1 / step_s, 4), "step_s": round(step_s, 5),
            "prefill_tokens_per_s": round(prompt / prompt_s, 3), "hit_rate": round(t.hit_rate, 4),
            "missed_bytes_per_token": round(missed), "wasted_bytes": t.bytes_wasted, "ready": t.ready,
            "late": t.late, "collision": t.collision, "waited_s_per_token": round(waited_s, 5),
            "routed_as_recorded": agreed(watched, wanted), "disk_bytes_per_s": [round(r) for r in rates],
            "of_ceiling": round(missed / rate / step_s, 4),
            "replayed": replayed(trace, a.experts, slots, link, a.new),
            "process_bytes": m.placement.process, "peak_bytes": peak(),
            "logits": [round(v, 4) for v in out.logits_KV[-1][:SHOWN].tolist()],
        }  # fmt: skip


def replayed(trace: Trace, spec: str, slots: int, link: Link, new: int) -> Row:
    """The same trace, slots and link in virtual time; computing as long as it took."""
    knobs = parse_experts(spec)
    policy = knobs.policy(slots, Hints(per_layer=trace.experts, layers=trace.layers))
    last = min(e.number for e in trace.events if e.phase == 1) + new
    events = waves([e for e in trace.events if e.number < last], policy.room)
    ahead = prefetcher(knobs.prefetch, trace.experts)
    setup = ReplaySetup(policy, slots, link, ahead, num_experts=trace.experts)
    out = Replay(setup).run(events)[1]
    hit_rate, speed = round(out.stats.hit_rate, 4), round(out.tokens / out.seconds, 4)
    return {"hit_rate": hit_rate, "tokens_per_s": speed}


def against(ours: Row, theirs: Row) -> Row:
    """Their run: the ratios, and how like the last logits are (1: the same up to a factor)."""
    out = {f"{key}_ratio": round(ours[key] / theirs[key], 3) for key in KEYS if key in theirs}
    if "logits" in theirs:
        both = np.corrcoef(ours["logits"], theirs["logits"])
        out["logits_correlation"] = round(float(both[0, 1]), 5)
    return theirs | out


def main() -> None:
    a = arguments(
        __doc__, "model", "trace", memory=int, wrap=WRAP, experts=(SPECS, "semicolon-separated"),
        shape=("30b-a3b", "a size of `outsize bench synthetic`, or small"), new=128, context=256,
        types=("q4_0", "or q3_k: of a model that is made"),
        recall=(1.0, "an early gate that is right so often"), repeats=1, worker=HIDDEN,
        peer=(False, "llama.cpp, too, after each repeat"), python=("", "another one for llama.cpp"),
    )  # fmt: skip
    a.model, a.trace = Path(a.model), Path(a.trace)
    trace = read(a.trace)
    prompt = prompt_of(trace)
    a.new = min(a.new, len(choices(trace)[0]) - prompt)
    if a.worker:
        print(json.dumps(worker(a, trace)))
        return
    if not a.model.exists():
        make(a.model, a.shape, trace, types=a.types)
    fetch.pack(str(a.model), quiet=True)
    told = ["--memory", a.memory, "--new", a.new, "--context", a.context, "--recall", a.recall]
    ours = [
        "-m",
        "experiments.caching.experts",
        str(a.model),
        str(a.trace),
        "--worker",
        *map(str, told),
    ]
    peer = [LLAMA, str(a.model), "--cold", "--no-repack", "--first-id", str(FIRST)]
    peer += ["--prompt-tokens", str(prompt), "--new-tokens", str(a.new)]
    facts = {"model": a.model.name, "trace": a.trace.name, "num_experts": trace.experts,
             "used": trace.used, "prompt_tokens": prompt, "new_tokens": a.new}  # fmt: skip
    for _ in range(a.repeats):
        specs = a.experts.split(";")
        rows = [fresh(*ours, "--experts", s, wrap=a.wrap, cap=a.memory) for s in specs]
        if a.peer:
            theirs = fresh(*peer, wrap=a.wrap, cap=a.memory, python=a.python)
            rows.append(against(rows[0], theirs))
        for row in rows:
            record(facts | {k: v for k, v in row.items() if k != "logits"}, a.output)


if __name__ == "__main__":
    main()
