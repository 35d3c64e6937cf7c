"""Decode of mixtures at published widths with most experts on disk:
`python -m experiments.memory.families NAME:LAYERS... --memory BYTES [--new 48] [-o FILE.jsonl]`.

NAME is a size of `outsize bench synthetic`; so many of its layers, with random weights (Q4_0). `--memory` is
for the whole model: a slice gets what holds the same share of its experts. Weights being random, each token's
experts are as good as drawn by lot, so that the hit rate is the share of experts that have slots; real
routing repeats itself. One row a model: tokens/s, bytes that were missed, the disk's rate in the same
sitting, what is left of a step without waiting, and the share of max(read, compute); and the whole model's
tokens/s, if its further layers are as those that ran.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import outsize
from experiments.memory.paging import Disk
from experiments.runs import HIDDEN, Row, arguments, fresh, good, record, told_all
from outsize.bench.synthetic.gguf import write
from outsize.bench.synthetic.shapes import SIZES, Size
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.plan import decide, probe
from outsize.plan.warmup import runtime_bytes
from outsize.system.memory import peak

FAMILIES = {"35b-a3b": "qwen3_5_moe", "30b-a3b-flash": "glm4_moe_lite"}
PROMPT, CONTEXT, EVERY = 16, 256, 8


def made(name: str, layers: int, folder: Path) -> str:
    """The pack of so many layers, made if it is not there: the file itself is not kept."""
    size = replace(SIZES[name], layers=layers)
    path = folder / f"{name}-{layers}.gguf"
    kept = path.with_suffix(".pack")
    if not kept.exists():
        write(path, FAMILIES[name], size, 1)
        kept.write_text(str(fetch.pack(str(path), quiet=True).path))
        path.unlink()
    return kept.read_text()


def share(name: str, memory: int, pack: str) -> tuple[float, int]:
    """Of the whole model's experts, the share that so much memory holds; and what a slice needs for it."""
    whole: Size = SIZES[name]
    options = LoadOptions(context=CONTEXT, quiet=True, draft="none")
    runtime = runtime_bytes(decide.compiled(options))
    outline, placement = decide.foresee(pack, options, 1 << 40, runtime)
    experts = sum(t.size for t in outline.tables if t.kind == "experts")
    rest, beside = outline.size - experts, sum(placement.fixed.values())
    head = sum(t.size for t in outline.tables if t.kind == "rows")
    layers, routed = outline.description.num_layers, len(outline.description.routed)
    all_rest = head + (rest - head) * whole.layers / layers
    all_experts = experts / routed * (whole.layers - (layers - routed))
    held = max(0.0, (memory - beside - all_rest) / all_experts)
    return held, int(beside + rest + held * experts)


def worker(pack: str, memory: int, new: int) -> Row:
    with outsize.load(pack, memory=memory, context=CONTEXT, quiet=True, draft="none") as m:
        disk, kv, d = Disk(m), m.transformer.new_kv(CONTEXT), m.pack.description
        tokens = [(i * i * 7919 + 13 * i + 5) % (d.vocab_size - 300) for i in range(PROMPT + new)]
        rates, steps = [disk.rate()], []
        full(m.transformer, [Span(0, tokens[:PROMPT])], [kv])
        before, waited_s = m.counts(), m.traffic.waited_s
        for i in range(new):
            begun = time.perf_counter()
            full(m.transformer, [Span(PROMPT + i, [tokens[PROMPT + i]])], [kv])
            steps.append(time.perf_counter() - begun)
            if i % EVERY == EVERY - 1:
                rates.append(disk.rate())
        t, step_s = m.counts().experts - before.experts, sum(steps) / new
        streamed = m.placement.streamed
        missed = (t.bytes_demanded + t.bytes_useful) / new + streamed
        rate = statistics.mean(rates)
        compute_s = step_s - (m.traffic.waited_s - waited_s) / new
        slots = sum(s.ring for k, s in m.placement.shares.items() if k.startswith("experts"))
        count = sum(len(h.keys) for h in m.pack.tables if h.kind == "experts")
        return {
            "layers": d.num_layers, "pack_bytes": m.pack.size, "memory": memory, "tokens": new,
            "tokens_per_s": 1 / step_s, "step_s": step_s, "median_step_s": statistics.median(steps),
            "hit_rate": t.hit_rate, "slots_share": slots / count, "missed_bytes_per_token": missed,
            "streamed_bytes": streamed, "disk_bytes_per_s": rates, "read_s": missed / rate,
            "compute_s": compute_s, "of_ceiling": max(missed / rate, compute_s) / step_s,
            "peak_bytes": peak(),
        }  # fmt: skip


def main() -> None:
    a: argparse.Namespace = arguments(
        __doc__, "models+", memory=4_000_000_000, new=48, folder="", worker=("", HIDDEN[1])
    )
    if a.worker:
        told_all(worker(a.worker, a.memory, a.new), None)
        return
    for told in a.models:
        name, _, layers = told.partition(":")
        pack = made(name, int(layers), Path(a.folder))
        held, memory = share(name, a.memory, pack)
        me = ["-m", "experiments.memory.families", name, "--worker", pack]
        row = good(fresh(*me, "--memory", str(memory), "--new", str(a.new)))
        whole = row["tokens_per_s"] * int(layers) / SIZES[name].layers
        about = {"model": name, "family": FAMILIES[name], "whole_layers": SIZES[name].layers,
                 "for_memory": a.memory, "held_share": held, "processor": probe.processor()}  # fmt: skip
        record({**about, **row, "whole_tokens_per_s": whole}, a.output)


if __name__ == "__main__":
    main()
