"""Decode of mixtures at published widths with most experts on disk:
`python -m experiments.memory.families NAME:LAYERS... --memory BYTES [--new 48] [-o FILE.jsonl]`.

NAME is a size of `outsize bench synthetic`; so many of its layers, with random weights (Q4_0), are run. The
plan of the whole model says which share of its experts has slots in `--memory`; the slice gets the memory in
which the same share of its own has. Random weights route all tokens alike, so that experts are drawn by lot
here, for each token and layer: nothing of a choice repeats, the worst there is. One row a model: tokens/s,
bytes that were missed, the disk's rate in the same sitting, what is left of a step without waiting, the share
of max(read, compute); and the whole model's tokens/s, if its other layers are as those that ran.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import outsize
from experiments.memory.paging import Disk
from experiments.runs import HIDDEN, Row, arguments, fresh, good, record, told_all
from outsize.bench.synthetic import shapes
from outsize.bench.synthetic.gguf import write
from outsize.checkpoint.checkpoint import Checkpoint, TokenizerSpec
from outsize.checkpoint.checkpoint import Tensor as Stored
from outsize.checkpoint.ggml import BY_NAME
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.model.ffn.experts import Mixture
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.pack.outline import Outline, of_checkpoint, of_pack
from outsize.plan import decide, place, probe
from outsize.plan.warmup import runtime_bytes
from outsize.system.memory import peak

FAMILIES = {"35b-a3b": "qwen3_5_moe", "30b-a3b-flash": "glm4_moe_lite"}
PROMPT, CONTEXT, EVERY = 16, 1024, 8
NO_TOKENS = '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'


class Drawn:
    """In a router's place: experts by lot, alike weighed."""

    def __init__(self, own: Any, count: int, used: int, seed: int) -> None:
        self.norm, self.reads, self.early = own.norm, own.reads, own.early
        self._count, self._used, self._random = count, used, random.Random(seed)

    def __call__(
        self, x_TD: Tensor, wide: bool, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        ids = [self._random.sample(range(self._count), self._used) for _ in x_TD]
        return torch.tensor(ids), torch.full((len(ids), self._used), 1 / self._used)


def made(name: str, layers: int, folder: Path) -> str:
    """The pack of so many layers, made if it is not there: the file itself is not kept."""
    size = replace(shapes.SIZES[name], layers=layers)
    path = folder / f"{name}-{layers}.gguf"
    kept = path.with_suffix(".pack")
    if not kept.exists():
        write(path, FAMILIES[name], size, 1)
        kept.write_text(str(fetch.pack(str(path), quiet=True).path))
        path.unlink()
    return kept.read_text()


def whole(name: str) -> Outline:
    """Of all layers, from shapes alone."""
    family, tensors = FAMILIES[name], {}
    for n, shape, kind in shapes.tensors(shapes.recipe(family, shapes.SIZES[name])):
        block = BY_NAME[kind]
        nbytes = torch.Size(shape).numel() // block.length * block.size
        tensors[n] = Stored(n, block, shape, Path("none"), 0, nbytes)
    keys = shapes.gguf_values(family, shapes.SIZES[name])
    spec = TokenizerSpec(json=NO_TOKENS)
    of = Checkpoint("gguf", shapes.ARCHITECTURES[family], keys, tensors, spec, ())
    return of_checkpoint(of, name, "auto", True)


def slots_of(o: Outline, memory: int, runtime: int) -> float:
    """The share of experts that have slots."""
    found = place.place(o, memory, runtime, 5_000_000, CONTEXT)
    experts = [t for t in o.tables if t.kind == "experts"]
    return sum(found.shares[t.name].ring for t in experts) / sum(len(t.keys) for t in experts)


def memory_for(o: Outline, share: float, runtime: int) -> int:
    """In which a model's plan has that share of experts in slots."""
    low = place.least_bytes(o, runtime, 5_000_000, CONTEXT)
    high = low + 2 * o.size
    while high - low > 1_000_000:
        half = (low + high) // 2
        low, high = (low, half) if slots_of(o, half, runtime) >= share else (half, high)
    return high


def worker(pack: str, memory: int, new: int) -> Row:
    with outsize.load(pack, memory=memory, context=CONTEXT, quiet=True, draft="none") as m:
        disk, kv, d = Disk(m), m.transformer.new_kv(CONTEXT), m.pack.description
        assert d.mixture is not None
        for i, layer in enumerate(m.transformer.paged_layers):
            if isinstance(layer.resident, Mixture):
                drawn = Drawn(layer.resident.router, d.mixture.count, d.mixture.used, i)
                layer.resident.router = drawn  # type: ignore[assignment]
        tokens = [(i * i * 7919 + 13 * i + 5) % (d.vocab_size - 300) for i in range(PROMPT + new)]
        rates, steps = [disk.rate()], []
        full(m.transformer, [Span(0, tokens[:PROMPT])], [kv])
        before, waited_s = m.counts().experts, m.traffic.waited_s
        for i in range(new):
            begun = time.perf_counter()
            full(m.transformer, [Span(PROMPT + i, [tokens[PROMPT + i]])], [kv])
            steps.append(time.perf_counter() - begun)
            if i % EVERY == EVERY - 1:
                rates.append(disk.rate())
        t, step_s, streamed = m.counts().experts - before, sum(steps) / new, m.placement.streamed
        missed, rate = (t.bytes_demanded + t.bytes_useful) / new + streamed, statistics.mean(rates)
        compute_s = step_s - (m.traffic.waited_s - waited_s) / new
        slots = sum(s.ring for k, s in m.placement.shares.items() if k.startswith("experts"))
        return {
            "layers": d.num_layers, "pack_bytes": m.pack.size, "memory": memory, "tokens": new,
            "tokens_per_s": 1 / step_s, "step_s": step_s, "median_step_s": statistics.median(steps),
            "hit_rate": t.hit_rate, "slots_share": slots / (len(d.routed) * d.mixture.count),
            "missed_bytes_per_token": missed, "streamed_bytes": streamed, "disk_bytes_per_s": rates,
            "read_s": missed / rate, "compute_s": compute_s,
            "of_ceiling": max(missed / rate, compute_s) / step_s, "peak_bytes": peak(),
        }  # fmt: skip


def main() -> None:
    a = arguments(
        __doc__, "models+", memory=4_000_000_000, new=48, folder="", worker=("", HIDDEN[1])
    )
    if a.worker:
        told_all(worker(a.worker, a.memory, a.new), None)
        return
    runtime = runtime_bytes(decide.compiled(LoadOptions(quiet=True)))
    for told in a.models:
        name, _, layers = told.partition(":")
        pack, share = (
            made(name, int(layers), Path(a.folder)),
            slots_of(whole(name), a.memory, runtime),
        )
        memory = memory_for(of_pack(fetch.pack(pack, quiet=True)), share, runtime)
        me = ["-m", "experiments.memory.families", name, "--worker", pack]
        row = good(fresh(*me, "--memory", str(memory), "--new", str(a.new)))
        about = {
            "model": name, "family": FAMILIES[name], "whole_layers": shapes.SIZES[name].layers,
            "whole_bytes": whole(name).size, "for_memory": a.memory, "planned_share": share,
            "processor": probe.processor(),
            "whole_tokens_per_s": row["tokens_per_s"] * int(layers) / shapes.SIZES[name].layers,
        }  # fmt: skip
        record({**about, **row}, a.output)


if __name__ == "__main__":
    main()
