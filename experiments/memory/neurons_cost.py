"""What paged neurons cost beside their reads, and what the plan says of it: feed-forwards dense and by
bundles that are all in memory, part by part; and reads of bundles against the cost model start + bytes.

    python -m experiments.memory.neurons_cost parts MODEL NAME FILE... -o RAW.jsonl
    python -m experiments.memory.neurons_cost reads MODEL NAME FILE -o RAW.jsonl
    python -m experiments.memory.neurons_cost choices MODEL NAME FILE -o RAW.jsonl

FILE: of `outsize adapt sparsity`. `parts`: microseconds a layer of choosing, of putting the chosen bundles
together and of computing with them, by how many are chosen, beside the dense layer's; and what the plan has
for these. `reads`: bytes a second of runs of 1 to 16 bundles by 1 to 8 threads, and what a line through the
runs of 1 and 8 says of the others. `choices`: microseconds of choosing chunks of a layer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from experiments.memory.neurons_chunks import OFF, PROMPT
from experiments.runs import Row, arguments, record
from outsize.adapt.sparsity import reads
from outsize.engine import load as loading
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.kernels.backend import Backend
from outsize.kernels.gather import Pieces
from outsize.kernels.plain import PLAIN
from outsize.model.predictors.choose import Chooser
from outsize.options import LoadOptions
from outsize.pack import fetch, neuron_file
from outsize.plan import make as planning
from outsize.plan.decide import compiled
from outsize.plan.probe import median_s
from outsize.storage.reader import Reader
from outsize.storage.stats import IOStats
from outsize.storage.table import Table
from outsize.weights.bundles import find
from outsize.weights.neurons import NeuronBank, Scratch

TOKENS = 40  # that are timed, of each kind
COUNTS = 1, 2, 4, 8, 16
THREADS = 1, 2, 4, 8


class Clock:
    """Adds up the seconds that calls of some methods take."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*given, **more)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

        return timed


def run(model: str, neurons: str, clock: Clock) -> Row:
    """Milliseconds of a token, and of its parts, all of it in memory; and what the plan has."""
    options = LoadOptions(neurons=neurons, **OFF)  # type: ignore[arg-type]
    planned = planning.make(model, options, PROMPT)
    with ExitStack() as patches, loading.open_model(model, options) as opened:
        t, ids = opened.transformer, opened.tokens.encode("the cat sat on the mat and " * 30)
        for layer in t.paged_layers[1::2]:
            half: Any = layer.narrow or layer.resident
            half.run = clock.around("ffn", half.run)
        for of, method in (
            (Chooser, "__call__"), (NeuronBank, "fetch"), (Scratch, "gate_up"), (Scratch, "down"),
            (Scratch, "down_rows"),
        ):  # fmt: skip
            name = "choose" if of is Chooser else "gather"
            call = clock.around(name, getattr(of, method))
            patches.enter_context(
                mock.patch.object(of, method, lambda *a, call=call, **k: call(*a, **k))
            )
        kv = t.new_kv(len(ids))
        full(t, [Span(0, ids[:PROMPT])], [kv])
        times = []
        for at in range(PROMPT, PROMPT + 2 * TOKENS):
            if at == PROMPT + TOKENS:
                clock.seconds.clear()
            began = time.perf_counter()
            full(t, [Span(at, [ids[at]])], [kv])
            times.append(time.perf_counter() - began)
        count = t.description.num_layers
    each = {k: 1e6 * v / TOKENS / count for k, v in clock.seconds.items()}
    row = {
        "layers": count, "token_ms": 1e3 * sum(times[TOKENS:]) / TOKENS,
        "plan_compute_ms": 1e3 * planned.cost.compute_s, **{f"{k}_us": v for k, v in each.items()},
    }  # fmt: skip
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}


def parts(model: str, paths: list[str], about: Row) -> Iterator[Row]:
    """The dense model, then with each file."""
    dense = run(model, "off", Clock())
    yield about | {"kind": "parts", "file": "off", "fires": 1.0} | dense
    pack = fetch.pack(model, quiet=True)
    for path in paths:
        file = neuron_file.read(Path(path), pack.description.num_layers)
        bundles = find(pack, file.about.bundle, file.about.order)
        stride = sum(t.bundles.size for t in bundles.tables) / pack.description.num_layers
        row = run(model, path, Clock())
        said = {
            "file": Path(path).stem, "predictor": file.about.predictor, "bundle": bundles.bundle,
            "by_rows": bool(file.about.order), "fires": file.about.fires,
            "bytes": round(stride * file.about.fires),
            "saved": round(1 - row["token_ms"] / dense["token_ms"], 4),
            "plan_saved": round(1 - row["plan_compute_ms"] / dense["plan_compute_ms"], 4),
        }  # fmt: skip
        yield about | {"kind": "parts"} | said | row


def curve(model: str, path: str, about: Row) -> Iterator[Row]:
    """Seconds of a read, by bundles in it and threads; and by a line through those of 1 and 8."""
    pack = fetch.pack(model, quiet=True)
    file = neuron_file.read(Path(path), pack.description.num_layers)
    bundles = find(pack, file.about.bundle, file.about.order)
    table = Table(bundles.path, bundles.tables[0].bundles, IOStats(), "never")
    stride = table.header.stride
    for threads in THREADS:
        with Reader(threads, compiled(LoadOptions(quiet=True))) as reader:
            found = {n: reads.seconds(reader, table, n) for n in COUNTS}
        each = (found[8] - found[1]) / 7
        for n, s in found.items():
            line = found[1] + (n - 1) * each
            yield about | {
                "kind": "reads", "threads": threads, "bundles": n, "bytes": n * stride,
                "us": round(1e6 * s, 2), "line_us": round(1e6 * line, 2),
                "gb_per_s": round(n * stride / s / 1e9, 4), "gap": round((found[1] - each) / each, 3),
                "direct": table.is_direct,
            }  # fmt: skip
    table.close()


def choices(about: Row) -> Iterator[Row]:
    """Microseconds of choosing chunks of so many bundles, in C and in Python; of random values."""
    for backend in (compiled(LoadOptions(quiet=True)), PLAIN):
        for count in (48, 192, 304):
            value = torch.randn(1, count, generator=torch.Generator().manual_seed(0))
            s = median_s(partial(backend.chunks, value, 0.7), 400)
            us = round(1e6 * s, 2)
            yield about | {"kind": "choice", "backend": backend.name, "bundles": count, "us": us}
        yield about | {"kind": "gather", "backend": backend.name, **gathered(backend)}


def gathered(backend: Backend) -> Row:
    """Bytes a second of putting a field of 96 bundles of a layer where it belongs, many layers in turn."""
    records = torch.zeros(30 * 192, 12288, dtype=torch.uint8)
    to, at = torch.zeros(1, 96 * 8192, dtype=torch.uint8), torch.arange(96)
    places = [torch.randperm(192)[:96] + 192 * layer for layer in range(30)]
    turns = itertools.cycle(places)
    s = median_s(lambda: backend.gather(records, next(turns), Pieces(512, 1, 8192), to, at), 60)
    return {"us": round(1e6 * s, 2), "gb_per_s": round(to.nbytes / s / 1e9, 3)}


def main() -> None:
    a: Any = arguments(__doc__, "what", "model", "name", "files+")
    about = {"model": a.name}
    if a.what == "reads":
        made = curve(a.model, a.files[0], about)
    else:
        made = choices(about) if a.what == "choices" else parts(a.model, a.files, about)
    for row in made:
        record(row, a.output)


if __name__ == "__main__":
    main()
