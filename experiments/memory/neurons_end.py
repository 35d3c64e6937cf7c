"""Neurons from disk end to end, at equal memory: what each step of LLM in a flash (arXiv 2312.11514) brings
in tokens/s. Every run is a process of its own, reads past the page cache, and feeds a text token by token.

    python -m experiments.memory.neurons_end time MODEL TEXT NAME --files exact=FILE lossy=FILE -o RAW.jsonl
    python -m experiments.memory.neurons_end trace MODEL TEXT NAME --files exact=FILE > TRACE.json
    python -m experiments.memory.neurons_end about MODEL TEXT NAME --files exact=FILE lossy=FILE -o RAW.jsonl
    python -m experiments.memory.neurons_end capped MODEL TEXT NAME --files exact=FILE --wrap CAP -o RAW.jsonl
    python -m experiments.memory.neurons_end shape MODEL7B TEXT NAME --trace TRACE.json --folder FOLDER

Arms: `naive`, the least memory, every weight read for every token; `half`, so much memory that such a --share
of the weights is held, neurons off; and for each file `KEY-predictor`, everything but the feed-forwards held
and slots for one layer's bundles, so that nothing is kept between tokens; `KEY-window` and `KEY-lfu`, the
memory of `half` with that eviction policy; `KEY-apart`, lfu where each bundle is a read of its own.
`capped`: --rounds runs, from the least memory that the plan names to all, each within exactly its own.
`shape` makes a ReLU model of a pack with random weights, and a file whose predictor costs what a real one
does; `time --trace` then replays which bundles fired in TRACE instead of what that predictor says: each of
its layers follows one of the traced model's, each of its bundles one of that layer's, in an order drawn once,
so that how many fire and how long they stay is the traced model's, and neighbours know nothing of each
other."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from experiments.memory.neurons_chunks import OFF, PROMPT
from experiments.memory.neurons_steps import recorded
from experiments.runs import HIDDEN, WRAP, Row, arguments, fresh, record
from outsize.adapt import rewrite
from outsize.adapt.sparsity.layer import Layer
from outsize.adapt.sparsity.run import SparsityOptions, Work
from outsize.adapt.sparsity.words import Words
from outsize.encoding.find import encoding
from outsize.engine import load as loading
from outsize.errors import BudgetError
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.model.predictors.choose import Chooser, Rule
from outsize.options import LoadOptions
from outsize.pack import fetch, neuron_file
from outsize.pack.neuron_file import stored
from outsize.pack.source import derived
from outsize.pack.tables import Matrix
from outsize.plan import decide
from outsize.plan import make as planning
from outsize.plan.decide import compiled
from outsize.plan.warmup import runtime_bytes
from outsize.progress import silent
from outsize.storage.reader import Reader
from outsize.storage.records import Records
from outsize.system.memory import peak
from outsize.weights.bundles import find, make

RANK = 128  # of the predictor of the shape
Trace = list[list[list[int]]]  # bundles, by token and layer


class Replay:
    """What a trace says, in place of what the predictor scored; that is computed, and left."""

    def __init__(self, trace: Trace, bundles: int, layers: int, count: int) -> None:
        """`bundles`: of a traced layer; `layers`, `count`: of the model that runs, and of its layers."""
        self._layers, self._called, self._plain = layers, 0, Chooser.__call__
        traced, generator = len(trace[0]), torch.Generator().manual_seed(0)
        spread = torch.arange(count) * bundles // count
        self._rows: list[Tensor] = []
        orders = [torch.randperm(count, generator=generator) for _ in range(layers)]
        for token in trace:
            for layer, order_N in enumerate(orders):
                fired = torch.zeros(bundles, dtype=torch.bool)
                fired[token[layer * traced // layers]] = True
                self._rows.append(fired[spread][order_N])

    def firing(self) -> Tensor:
        """(layers, N): how often each fires."""
        return torch.stack(self._rows).float().view(-1, self._layers, len(self._rows[0])).mean(0)

    def __call__(self, chooser: Chooser, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        _, scores_TN = self._plain(chooser, x_TD)
        row_N = self._rows[self._called % len(self._rows)]
        self._called += 1
        return row_N.expand(len(x_TD), -1), scores_TN


def timed(a: Any) -> Row:
    """One run."""
    options = LoadOptions(neurons=a.neurons, memory=str(a.memory), context=1024, **OFF)  # type: ignore[arg-type]
    predicted = planning.make(a.model, options, PROMPT).cost
    with ExitStack() as stack:
        if a.apart:
            stack.enter_context(mock.patch.object(Reader, "submit_scattered", return_value=None))
        m = stack.enter_context(loading.open_model(a.model, options))
        t, d = m.transformer, m.pack.description
        if a.trace and a.neurons != "off":
            found, count = json.loads(Path(a.trace).read_text()), d.ffn_width // 32
            replay = Replay(found["trace"], found["bundles"], d.num_layers, count)
            chosen = lambda self, x: replay(self, x)  # noqa: E731
            stack.enter_context(mock.patch.object(Chooser, "__call__", chosen))
        ids = ids_of(m, a.text, PROMPT + a.warm + a.count)
        kv, digest, times = t.new_kv(len(ids)), hashlib.sha256(), []
        full(t, [Span(0, ids[:PROMPT])], [kv])
        for at in range(PROMPT, len(ids)):
            if at == PROMPT + a.warm:
                before = m.traffic
            began = time.perf_counter()
            (out,) = full(t, [Span(at, [ids[at]])], [kv])
            times.append(time.perf_counter() - began)
            digest.update(out.logits_KV.numpy().tobytes())
        used = m.traffic
        caches = [c for c in t.loaded.caches if c.table.header.kind == "neurons"]
        return {
            "tokens": a.count, "direct": all(c.table.is_direct for c in t.loaded.caches),
            "held_share": round(1 - m.placement.streamed / m.pack.size, 4),
            "slots": sum(c.slots for c in caches),
            "ms": round(1e3 * statistics.mean(times[a.warm :]), 3),
            "median_ms": round(1e3 * statistics.median(times[a.warm :]), 3),
            "mb": round((used.bytes_read - before.bytes_read) / a.count / 1e6, 4),
            "peak_bytes": peak(), "waited_ms": round(1e3 * (used.waited_s - before.waited_s) / a.count, 3),
            "plan_ms": round(1e3 * predicted.token_s, 3), "logits_sha256": digest.hexdigest(),
        }  # fmt: skip


def ids_of(m: loading.Model, text: str, count: int) -> list[int]:
    """Of the text; of a model without words, some."""
    found = m.tokens.encode(Path(text).read_text()[: 8 * count])[:count] if text else []
    vocab = m.pack.description.vocab_size
    return found + [(i * i * 7919 + 5) % (vocab - 300) for i in range(count - len(found))]


def arms(a: Any) -> Iterator[tuple[str, str, int, bool]]:
    """Name, --neurons, bytes of memory, is each bundle a read of its own?"""
    off = LoadOptions(context=1024, **OFF)  # type: ignore[arg-type]
    plan = planning.make(a.model, off, PROMPT).placement
    pack = fetch.find(a.model)
    assert pack is not None
    for share in map(float, a.shares):
        half = int(plan.planned - (1 - share) * pack.size)
        yield f"naive@{share:g}", "off", int(plan.least + 12e6), False
        yield f"half@{share:g}", "off", half, False
        for key, path in (told.split("=") for told in a.files):
            one = 0
            if "predictor" in a.ways:
                one = memory_for(a.model, path, 1.0 / pack.description.num_layers)
            found = {
                "predictor": (f"{path},eviction=lru", one, False),
                "window": (f"{path},eviction=window", half, False),
                "lfu": (path, half, False),
                "apart": (path, half, True),
            }
            for name in a.ways:
                yield f"{key}-{name}@{share:g}", *found[name]


def memory_for(model: str, neurons: str, share: float) -> int:
    """Bytes with which such a share of the bundles has slots, by the planner."""
    options = LoadOptions(neurons=neurons, context=1024, **OFF)  # type: ignore[arg-type]
    runtime = runtime_bytes(compiled(options))
    low, high = 0, 1 << 33
    while high - low > 1 << 20:
        middle = (low + high) // 2
        try:
            outline, placed = decide.foresee(model, options, middle, runtime)
            found = [t for t in outline.tables if t.kind == "neurons"]
            slots = sum(placed.shares[t.name].ring for t in found if t.name in placed.shares)
            is_enough = slots >= share * sum(len(t.keys) for t in found)
        except BudgetError:
            is_enough = False
        low, high = (low, middle) if is_enough else (middle, high)
    return high


def sitting(a: Any) -> None:
    """All arms in turn, as often as asked."""
    every = list(arms(a))
    for number in range(a.rounds):
        for name, neurons, memory, apart in every:
            told = ["run", a.model, a.text, a.name, "--neurons", neurons, "--memory", str(memory)]
            told += [
                "--count",
                str(a.count),
                "--warm",
                str(a.warm),
                *(["--apart"] if apart else []),
            ]
            told += ["--trace", a.trace] if a.trace else []
            row = fresh("-m", "experiments.memory.neurons_end", *told)
            row = {k: v for k, v in row.items() if k not in ("cap", "kills")}
            about = {"model": a.name, "arm": name, "round": number, "memory": memory}
            record(about | row, a.output)


def capped(a: Any) -> None:
    """Budgets in equal steps; what each run had at most, and whether it was killed."""
    path = a.files[0].partition("=")[2]
    paged = LoadOptions(neurons=path, context=1024, **OFF)  # type: ignore[arg-type]
    plan = planning.make(a.model, paged, PROMPT).placement
    least, most = int(1.02 * plan.least), int(1.05 * plan.planned)
    for number in range(a.rounds):
        memory = least + (most - least) * number // max(1, a.rounds - 1)
        told = ["run", a.model, a.text, a.name, "--neurons", path, "--memory", str(memory)]
        told += ["--count", str(a.count), "--warm", str(a.warm)]
        row = fresh("-m", "experiments.memory.neurons_end", *told, wrap=a.wrap, cap=memory)
        record(
            {"kind": "capped", "model": a.name, "number": number, "memory": memory} | row, a.output
        )


def about(a: Any) -> None:
    """What the files say of themselves, as they were made."""
    pack = fetch.find(a.model)
    assert pack is not None
    for key, path in (told.split("=") for told in a.files):
        found = neuron_file.read(Path(path), pack.description.num_layers)
        bundles = find(pack, found.about.bundle, found.about.order)
        said = found.about.to_json()
        row = {
            k: said[k]
            for k in ("predictor", "exact", "bundle", "share", "fires", "missed", "tokens")
        }
        row |= {k: said[k] for k in ("perplexity_before", "perplexity")}
        strides = sum(t.form.count * t.form.stride for t in bundles.tables for _ in t.layers)
        dense = sum(t.dense.size for t in bundles.tables)
        sizes = {"mb": found.about.fires * strides / 1e6, "dense_mb": dense / 1e6}
        told_of = {"kind": "file", "model": a.name, "key": key, "predictor_mb": found.size / 1e6}
        record(told_of | row | sizes, a.output)


def trace(a: Any) -> None:
    """Which bundles fire for each token of the text."""
    path = a.files[0].partition("=")[2]
    pack = fetch.find(a.model)
    assert pack is not None
    found = recorded(a.model, path, Path(a.text).read_text()[: 12 * a.count], a.count)
    print(
        json.dumps({"model": a.name, "bundles": pack.description.ffn_width // 32, "trace": found})
    )


def shape(a: Any) -> None:
    """The ReLU model, its bundles, and the file."""
    base = fetch.find(a.model)
    assert base is not None
    relu = replace(base.description, activation="relu")
    who = rewrite.Identity(derived(base.source, "relu-shape", {"made": "relu shape"}))
    with Records(base) as records:
        pack = rewrite.write(base, records, {}, relu, who, silent)
    bundles, told = make(pack, 32, silent), json.loads(Path(a.trace).read_text())
    count, layers = relu.ffn_width // 32, relu.num_layers
    firing = Replay(told["trace"], told["bundles"], layers, count).firing()
    generator = torch.Generator().manual_seed(0)
    e, made = encoding("int8"), list[Layer]()
    for n in range(layers):
        maps = {
            name: torch.randn(*size, generator=generator)
            for name, size in (("a", (RANK, relu.width)), ("b", (count, RANK)))
        }
        matrices = {name: Matrix("int8", *w.shape, 0) for name, w in maps.items()}
        tensors = {
            f"{name}.{f}": t
            for name, w in maps.items()
            for f, t in stored(matrices[name], e.encode(w)).items()
        }
        made.append(Layer(matrices, tensors, {}, Rule(0.0), 1.0, firing[n], 0.0, 1.0))
    none = torch.zeros(1, 1, dtype=torch.long)
    options = SparsityOptions(str(pack.path), (), predictor=f"trained:{RANK}", order="natural")
    work = Work(pack, bundles, options, Words(none, none, "", ""), Path(), None)
    path = Path(a.folder) / f"{a.name}.neurons.safetensors"
    work.write(path, made, work.said(made, 0.0))
    print(json.dumps({"pack": str(pack.path), "file": str(path), "fires": float(firing.mean())}))


def main() -> None:
    a: Any = arguments(
        __doc__, "what", "model", "text", "name", files=["lossy="], shares=["0.5"], rounds=3, count=64,
        warm=24, ways=["predictor", "window", "lfu", "apart"], trace="", folder="",
        wrap=WRAP,
        neurons=("off", HIDDEN[1]), memory=(0, HIDDEN[1]), apart=HIDDEN,
    )  # fmt: skip
    if a.what == "run":
        record(timed(a))
    else:
        {"time": sitting, "trace": trace, "shape": shape, "capped": capped, "about": about}[a.what](
            a
        )


if __name__ == "__main__":
    main()
