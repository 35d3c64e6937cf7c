"""Bundles by importance alone against chunks of them by importance over read cost: perplexity, reads and
wall-clock, at equal memory, read past the page cache.

    python -m experiments.memory.neurons_chunks make MODEL TEXT NAME FOLDER --order use -o RAW.jsonl
    python -m experiments.memory.neurons_chunks time MODEL TEXT NAME FOLDER -o RAW.jsonl
    --pairs use-importance-0.6=use-chunks-0.7

`make` writes an add-on file to FOLDER for each way and share, all of one predictor that sees the same text,
with perplexity of held-out text (in spans of 16 tokens), and the price of a read that chunks were fitted by.
`time` decodes a text token by token with the files that are named, in turn, each in a process of its own with
slots for such a share of the bundles (--held): importance as it was before (each bundle a read), importance
with neighbours in one read, and chunks. Rows state what `outsize plan` says of the same run; `plan --runs
RAW.jsonl` says it again of runs that were recorded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from experiments.quality.neurons import CPU
from experiments.runs import HIDDEN, Row, arguments, fresh, good, record, recorded
from outsize.adapt.sparsity.cost import perplexity
from outsize.adapt.sparsity.layer import Layer, fit
from outsize.adapt.sparsity.measure import by_use, samples
from outsize.adapt.sparsity.reads import gap_of
from outsize.adapt.sparsity.rule import Choice
from outsize.adapt.sparsity.run import SparsityOptions, Work
from outsize.adapt.sparsity.words import words
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.engine import load as loading
from outsize.forward.full import full
from outsize.forward.span import Span
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.pack.neuron_file import CHOICES, CHUNKS, IMPORTANCE
from outsize.pack.outline import Outline
from outsize.plan import decide
from outsize.plan import make as planning
from outsize.plan.cost import firing
from outsize.plan.decide import compiled
from outsize.plan.placement import Placement
from outsize.progress import silent
from outsize.storage.reader import Reader
from outsize.storage.records import Records
from outsize.storage.stats import IOStats
from outsize.weights.bundles import make
from outsize.weights.residency import Share

SHARES = 0.5, 0.6, 0.7, 0.8, 0.9
PROMPT, WARM = 32, 24  # tokens before those that are timed: as one span, and one by one
OFF = {"draft": "none", "prefix_cache": "off", "quiet": True}


@dataclass(frozen=True, slots=True)
class Arm:
    """A way of choosing, at a share."""

    order: str
    by: str
    share: float

    def __str__(self) -> str:
        return f"{self.order}-{self.by}-{self.share:g}"


def of(model: str, neurons: str) -> loading.Model:
    return loading.load(model, neurons=neurons, **OFF)  # type: ignore[arg-type]


def files(pack: Pack, a: Any) -> None:
    """Write them all, and record what each costs."""
    arms = [Arm(a.order, by, share) for by in a.ways for share in map(float, a.shares)]
    options = SparsityOptions(
        a.model, (Path(a.text),), predictor=a.predictor, order=a.order, quiet=True
    )
    found, native, d = (
        words(pack, options.data, a.tokens),
        compiled(LoadOptions(quiet=True)),
        pack.description,
    )
    model = TrainableModel(pack, CPU, matmul_type(CPU), silent)
    order_LF = by_use(model, found.ids_BT) if a.order == "use" else None
    bundles = make(pack, a.bundle or None, silent, order_LF)
    gap = a.gap or gap_of(bundles, native)
    work = Work(pack, bundles, options, found, Path(), order_LF)
    layers: dict[Arm, list[Layer]] = {arm: [] for arm in arms}
    with Records(pack) as records:
        for n, sample in enumerate(samples(model, found.ids_BT, bundles.bundle, 0.5, order_LF)):
            gate = work.gate(records, n, native)
            for arm, made in layers.items():
                choice, about = Choice(arm.by, gap), (d.activation, bundles.bundle)
                made.append(
                    fit(replace(sample, share=arm.share), a.predictor, about, gate, choice, native)
                )
    del model
    with of(str(pack.path), "off") as opened:
        before, count = perplexity(opened, found.held_out_BT, "", silent)
    for arm, made in layers.items():
        said = replace(work, options=replace(options, share=arm.share, choose=arm.by)).said(
            made, gap
        )
        path = Path(a.folder) / f"{arm}.safetensors"
        work.write(path, made, said)
        with of(str(pack.path), str(path)) as opened:
            after, _ = perplexity(opened, found.held_out_BT, "", silent)
        told = replace(
            said, tokens=count, perplexity_before=before, perplexity=after, text=found.text
        )
        work.write(path, made, told)
        layer = bundles.tables[0].form.stride * bundles.count
        row = {
            "kind": "file", "model": a.name, "order": a.order, "by": arm.by, "share": arm.share,
            "predictor": a.predictor, "bundle": bundles.bundle, "gap": round(gap, 3),
            "fires": said.fires, "missed": said.missed, "runs": said.runs,
            "mb": round(layer * said.fires * d.num_layers / 1e6, 3),
            "dense_mb": round(sum(t.dense.size for t in bundles.tables) / 1e6, 3),
            "reads": round(said.runs * d.num_layers, 1),
            "tokens": count, "dense": round(before, 4), "perplexity": round(after, 4),
        }  # fmt: skip
        record(row, a.output)


@contextmanager
def slots_for(share: float) -> Iterator[None]:
    """Whatever is opened meanwhile has slots for so many of its bundles, and no more."""
    plan = decide.decide

    def decided(outline: Outline, *given: Any) -> Placement:
        placed = plan(outline, *given)
        found = [t for t in outline.tables if t.kind == "neurons"]
        some = {t.name: Share((), int(share * len(t.keys))) for t in found}
        return replace(placed, shares={**placed.shares, **some})

    with mock.patch.object(decide, "decide", decided):
        yield


def planned(model: str, options: LoadOptions, held: float, hit_rate: float) -> Row:
    """What `outsize plan` has for such a run, at the hit rate that it expects and at what was reached."""
    plan = planning.make(model, options, PROMPT)
    c, paged = plan.cost, plan.outline.neurons
    assert paged is not None
    assert c.neuron_reads is not None
    expected, rows = firing(paged)(held)[0], {}
    for name, h in (("plan_", expected), ("plan_at_hit_", hit_rate)):
        size = c.expert_bytes * (1 - h)
        read_s = c.reading_s(h)
        rows |= {
            f"{name}ms": round(1e3 * (c.compute_s + read_s), 3), f"{name}read_ms": round(1e3 * read_s, 3),
            f"{name}reads": round(c.neuron_reads.reads(h), 2), f"{name}mb": round(size / 1e6, 4),
        }  # fmt: skip
    return rows | {
        "plan_hit_rate": round(expected, 4), "plan_compute_ms": round(1e3 * c.compute_s, 3),
        "disk": round(c.disk_bytes_per_s),
    }  # fmt: skip


def timed(a: Any) -> Row:
    """One arm: a text, token by token."""
    spec = f"{Path(a.folder) / a.arm}.safetensors,eviction={a.eviction}"
    options = LoadOptions(neurons=spec, **OFF)  # type: ignore[arg-type]
    none = mock.patch.object(Reader, "submit_scattered", return_value=None)
    with ExitStack() as stack:
        if a.apart:
            stack.enter_context(none)
        stack.enter_context(slots_for(a.held))
        opened = stack.enter_context(loading.open_model(a.model, options))
        t, text = opened.transformer, Path(a.text).read_text()
        ids, kv = opened.tokens.encode(text[: 8 * (a.count + 99)]), t.new_kv(a.count + 99)
        full(t, [Span(0, ids[:PROMPT])], [kv])
        times, before = list[float](), IOStats()
        for at in range(PROMPT, PROMPT + WARM + a.count):
            if at == PROMPT + WARM:
                before = IOStats() + t.loaded.expert_stats
            began = time.perf_counter()
            full(t, [Span(at, [ids[at]])], [kv])
            times.append(time.perf_counter() - began)
        used, caches = t.loaded.expert_stats - before, t.loaded.caches
        found = [c for c in caches if c.table.header.kind == "neurons"]
        slots, direct = sum(c.slots for c in found), all(c.table.is_direct for c in found)
    return {
        "direct": direct, "slots": slots, "tokens": a.count,
        "ms": round(1e3 * statistics.mean(times[WARM:]), 3),
        "median_ms": round(1e3 * statistics.median(times[WARM:]), 3),
        "waited_ms": round(1e3 * used.waited_s / a.count, 3),
        "mb": round(used.bytes_read / a.count / 1e6, 4), "reads": round(used.requests / a.count, 2),
        "hit_rate": round(used.hit_rate, 4), **planned(a.model, options, a.held, used.hit_rate),
    }  # fmt: skip


def rounds(a: Any) -> None:
    """Every pair in turn, as often as asked."""
    for number in range(a.rounds):
        for pair in a.pairs:
            one, two = pair.split("=")
            for way, arm in (("apart", one), (IMPORTANCE, one), (CHUNKS, two)):
                told = [a.model, a.text, a.name, a.folder, "--arm", arm, "--held", str(a.held)]
                told += ["--count", str(a.count), "--eviction", a.eviction]
                told += ["--apart"] if way == "apart" else []
                row = good(fresh("-m", "experiments.memory.neurons_chunks", "worker", *told))
                row = {k: v for k, v in row.items() if k not in ("cap", "status", "kills")}
                about = {"kind": "run", "model": a.name, "pair": pair, "way": way, "arm": arm}
                said = {"held": a.held, "eviction": a.eviction, "round": number}
                record(about | said | row, a.output)


def foreseen(a: Any) -> None:
    """What the plan says of runs that were recorded, at the hit rates that they reached."""
    runs = [r for r in recorded(Path(a.runs), {"kind": "run"}) if r["eviction"] == a.eviction]
    for way in (IMPORTANCE, CHUNKS):
        some = [r for r in runs if r["way"] == way]
        path = f"{Path(a.folder) / some[0]['arm']}.safetensors"
        options = LoadOptions(neurons=path, **OFF)  # type: ignore[arg-type]
        row = planned(a.model, options, a.held, some[0]["hit_rate"])
        ms = statistics.median(r["ms"] for r in some)
        told = {"kind": "plan", "model": a.name, "way": way, "eviction": a.eviction, "ms": ms}
        record(told | {"reads": some[0]["reads"], "mb": some[0]["mb"]} | row, a.output)


def main() -> None:
    a: Any = arguments(
        __doc__, "what", "model", "text", "name", "folder", order="use", predictor="gate:4", bundle=0,
        tokens=8192, gap=0.0, shares=[str(s) for s in SHARES], pairs=[""], ways=[*CHOICES], held=0.25,
        count=64, rounds=3, eviction="lfu", runs="", arm=("", HIDDEN[1]), apart=HIDDEN,
    )  # fmt: skip
    if a.what == "worker":
        record(timed(a))
    elif a.what == "time":
        rounds(a)
    elif a.what == "plan":
        foreseen(a)
    else:
        Path(a.folder).mkdir(parents=True, exist_ok=True)
        files(fetch.pack(a.model, quiet=True), a)


if __name__ == "__main__":
    main()
