"""Decode of each kind of block at full width, by processor time of one thread, next to a plain read of
memory: `python -m experiments.engine.blocks [--repeats 60] -o FILE.jsonl`.

Slices of a few layers with random weights (Q4_0 or Q4_K_M's mix), of the widths of published models, wholly
in memory. One row for each sub-layer: the median of milliseconds of processor time for one token, the bytes
of weights and states that it reads (and of states, writes), and the share of what one thread reads in that
time. Processor time, so that others on the machine count for little; they still share its caches and memory.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import outsize
from experiments.runs import Row, arguments, record
from outsize.bench.synthetic.gguf import write
from outsize.bench.synthetic.shapes import SIZES, Size
from outsize.engine.model import Model
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.kernels.rows import Segment
from outsize.plan import probe

# Family, model whose widths these are, and the slice.
SLICES: dict[str, tuple[str, Size]] = {
    "Qwen3.5-35B-A3B": ("qwen3_5_moe", replace(SIZES["35b-a3b"], layers=2, vocab=4096)),
    "Qwen3.5-9B": ("qwen3_5", replace(
        SIZES["35b-a3b"], layers=2, vocab=4096, width=4096, ffn=12_288, kv_heads=4, experts=0, used=0)),
    "GLM-4.7-Flash": ("glm4_moe_lite", replace(SIZES["30b-a3b-flash"], layers=2, vocab=4096)),
    "LFM2-2.6B": ("lfm2", Size(2, 2048, 10_752, 32, 8, 4096)),
}  # fmt: skip
KINDS = {"attn": "attention", "delta": "gated delta rule", "conv": "short convolution", "ffn": "experts",
         "dense": "feed-forward"}  # fmt: skip
PAST = 64  # tokens before


def processor_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def read_rate(pieces: torch.Tensor) -> float:
    """Bytes a second that one thread reads from memory, by its processor time. (It finds the largest number
    faster than the sum.)"""
    return pieces[0].nbytes / min(processor_s(piece.max) for piece in pieces)


def kind_of(model: Model, number: int) -> str:
    """What a sub-layer is called."""
    d, layer = model.pack.description, number // 2
    if number % 2 == 0:
        mixer = d.layers[layer].mixer
        name = {"attention": "attn"}.get(mixer, mixer)
        return "latent attention" if name == "attn" and d.latent else KINDS[name]
    return KINDS["dense"] if layer not in d.routed else KINDS["ffn"]


def read_bytes(model: Model, number: int) -> int:
    """Of weights that one token computes with, and of the state that it reads and writes."""
    d, layer = model.pack.description, number // 2
    names = ("attn", "delta", "conv") if number % 2 == 0 else ("ffn", "dense")
    own = [t for t in model.pack.tables if t.name.split("-")[0] in names and layer in t.keys]
    size = sum(t.stride for t in own)
    if number % 2 and d.mixture is not None and layer in d.routed:
        (experts,) = [t for t in model.pack.tables if t.kind == "experts"]
        size += d.mixture.used * experts.stride
    if number % 2 == 0 and d.delta is not None and d.layers[layer].mixer == "delta":
        size += 2 * 4 * d.delta.value_heads * d.delta.key * d.delta.value
    return size


def measure(model: Model, repeats: int, about: Row, output: Path | None) -> None:
    t, pieces = model.transformer, torch.ones(4, 16 << 20, dtype=torch.float32)
    kv, took = t.new_kv(PAST + repeats + 1), [list[float]() for _ in t.paged_layers]
    tokens = [1 + i % 200 for i in range(PAST)]
    full(t, [Span(0, tokens)], [kv])
    rates = []
    with torch.inference_mode():
        for i in range(repeats):
            rates.append(read_rate(pieces))
            h_TD = t.embed([1 + i])
            step = t.step([Segment(kv, range(PAST + i, PAST + i + 1))], False)
            for number, layer in enumerate(t.paged_layers):
                took[number].append(processor_s(partial(layer, [(h_TD, step)])))
    rate = statistics.median(rates)
    for number, times in enumerate(took):
        size, s = read_bytes(model, number), statistics.median(times[5:])
        row: Row = {
            **about, "block": kind_of(model, number), "layer": number // 2, "ms": s * 1e3,
            "least_ms": min(times) * 1e3, "bytes": size, "read_bytes_per_s": rate,
            "share": size / s / rate,
        }  # fmt: skip
        record(row, output)


def main() -> None:
    a = arguments(__doc__, repeats=60, only="", types="q4_0")
    torch.set_num_threads(1)
    for name, (family, size) in SLICES.items():
        if a.only and a.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "slice.gguf"
            write(path, family, size, 1, types=a.types)
            with outsize.load(str(path), context=512, threads=1, quiet=True) as model:
                about = {
                    "processor": probe.processor(), "backend": model.transformer.backend.name,
                    "model": name, "family": family, "types": a.types, "threads": 1,
                }  # fmt: skip
                measure(model, a.repeats, about, a.output)


if __name__ == "__main__":
    main()
