"""`outsize adapt sparsity`: measure which neurons of a dense model fire, fit what predicts them, set
thresholds, and write the add-on file, with what it costs. What is done is kept after each layer, and gone
on from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from outsize.adapt import checkpoints
from outsize.adapt.run import alone, check_place
from outsize.adapt.sparsity.cost import perplexity
from outsize.adapt.sparsity.kept import resumed, save
from outsize.adapt.sparsity.layer import Layer, fit
from outsize.adapt.sparsity.measure import by_use, samples
from outsize.adapt.sparsity.reads import gap_of
from outsize.adapt.sparsity.rule import parse
from outsize.adapt.sparsity.words import Words, words
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.arguments import real, whole
from outsize.encoding.find import encoding
from outsize.engine import load as loading
from outsize.engine.model import Model
from outsize.errors import OptionError
from outsize.kernels.backend import Backend
from outsize.model.predictors.gate import is_exact
from outsize.model.predictors.predictor import by_name
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.pack.bundles import GATE
from outsize.pack.format import Pack
from outsize.pack.neuron_file import (
    CHUNKS,
    FIRING,
    GAPS,
    IMPORTANCE,
    KIND,
    SUFFIX,
    THRESHOLDS,
    VERSION,
    NeuronAbout,
)
from outsize.plan.decide import compiled
from outsize.progress import Progress, bars, steps
from outsize.storage.records import Records
from outsize.storage.table import Weight
from outsize.weights.bundles import NATURAL, Bundles, bundles_of, digest, make, prepared

ORDERS = "use", "natural"


@dataclass(frozen=True, slots=True)
class SparsityOptions:
    """What to measure, and how much to compute."""

    model: str
    data: tuple[Path, ...]
    output: Path | None = None  # None: beside the pack, where `--neurons auto` finds it
    share: float = 0.5  # of the bundles, that are computed
    predictor: str = "svd"
    choose: str = IMPORTANCE  # of bundles: importance, chunks or chunks:GAP
    order: str = (
        "use"  # of neurons: by use, in bundles of few; or natural, in bundles of 32 neighbours
    )
    bundle: int | None = None  # neurons of a bundle
    tokens: int = 8192  # that are read of the data
    resume: bool = False
    quiet: bool = False
    memory: str | int = "auto"  # of the runs that measure the cost

    def __post_init__(self) -> None:
        real("share", self.share, 0.0, 1.0)
        if self.share == 0:
            raise OptionError("share is 0: nothing would be computed; give more than 0, up to 1")
        whole("tokens", self.tokens, 1, 1 << 30)
        if self.order not in ORDERS:
            raise OptionError(f"order is {self.order!r}; known are {', '.join(ORDERS)}")
        if self.bundle is not None:
            whole("bundle", self.bundle, 1, 1 << 16)
        parse(self.choose)
        module, size = by_name(self.predictor)  # refuses what is not known
        module.check(size)


@dataclass(frozen=True, slots=True)
class Made:
    """The file, and the table that is shown of it."""

    path: Path
    about: NeuronAbout
    table: tuple[str, ...]


def run(options: SparsityOptions) -> Made:
    """Raises OptionError, UnsupportedError, DataError, AdapterError, PackError, DiskFullError."""
    pack = fetch.find(options.model) or fetch.pack(options.model, quiet=options.quiet)
    order = NATURAL if options.order == "natural" else options.order
    bundles_of(pack, options.bundle, order)  # refuses what cannot be cut
    found = words(pack, options.data, options.tokens)
    path = options.output or pack.path.with_name(pack.path.name + SUFFIX)
    check_place(path)
    with alone(path):
        return _run(options, pack, found, path)


def _run(options: SparsityOptions, pack: Pack, found: Words, path: Path) -> Made:
    kept = path.with_name(path.name + ".checkpoint")
    checkpoints.check(options.resume, kept)
    with bars(options.quiet) as progress:
        model = TrainableModel(
            pack, torch.device("cpu"), matmul_type(torch.device("cpu")), progress
        )
        order_LF = by_use(model, found.ids_BT) if options.order == "use" else None
        bundles = make(pack, options.bundle, progress, order_LF)
    work = Work(pack, bundles, options, found, kept, order_LF)
    with steps(options.quiet) as draw:
        layers, gap = work.layers(model, draw)
        del model
        about = work.write(path, layers, work.said(layers, gap))
        about = _with_cost(path, layers, about, work, draw)
    kept.unlink(missing_ok=True)
    return Made(path, about, tuple(_table(layers, about, bundles)))


@dataclass(frozen=True, slots=True)
class Work:
    """A run's parts."""

    pack: Pack
    bundles: Bundles
    options: SparsityOptions
    words: Words
    checkpoint: Path
    order_LF: Tensor | None

    @property
    def order(self) -> str:
        """What names the order of the neurons."""
        return NATURAL if self.order_LF is None else digest(self.order_LF)

    @property
    def about(self) -> dict[str, object]:
        """What decides the result."""
        o, source = self.options, self.pack.source
        return {
            "kind": f"{KIND} checkpoint", "version": VERSION, "identity": source.identity,
            "layout": source.layout, "bundle": self.bundles.bundle, "share": o.share,
            "predictor": o.predictor, "data": self.words.fingerprint, "order": self.order,
            "choose": o.choose,
        }  # fmt: skip

    def layers(self, model: TrainableModel, progress: Progress) -> tuple[list[Layer], float]:
        """Every layer's, each kept in the checkpoint as soon as it is made; and the gap that they are fitted
        by."""
        o, d, choice = self.options, self.pack.description, parse(self.options.choose)
        native, done = compiled(LoadOptions(quiet=True)), list[Layer]()
        if o.resume:
            done, gap = resumed(self.checkpoint, self.about)
        else:
            gap = gap_of(self.bundles, native) if choice.gap is None else choice.gap
        choice = replace(choice, gap=gap)
        bundle, order = self.bundles.bundle, self.order_LF
        rest = samples(model, self.words.ids_BT, bundle, o.share, order, len(done))
        with Records(self.pack) as records:
            for sample in rest:
                progress(f"layer {len(done)}", len(done), d.num_layers)
                gate = self.gate(records, len(done), native)
                done.append(fit(sample, o.predictor, (d.activation, bundle), gate, choice, native))
                save(self.checkpoint, done, gap, self.about)
        return done, gap

    def gate(self, records: Records, layer: int, backend: Backend) -> Weight:
        """A layer's gate, as its bundles have it."""
        table = next(t for t in self.bundles.tables if layer in t.layers)
        read, (m, *_) = records.read(table.dense, table.layers.index(layer)), table.form.gate_up
        order = None if self.order_LF is None else self.order_LF[layer]
        some = prepared(table, read, order)[GATE]
        copied = {name: field.clone() for name, field in some.items()}
        return Weight(encoding(m.encoding, backend), copied, table.form.neurons)

    def write(self, path: Path, layers: list[Layer], about: NeuronAbout) -> NeuronAbout:
        """The add-on file."""
        tensors = {
            THRESHOLDS: torch.tensor([layer.rule.threshold for layer in layers]),
            FIRING: torch.stack([layer.firing_N for layer in layers]),
        }
        if about.choose == CHUNKS:
            tensors[GAPS] = torch.tensor([layer.rule.gap or 0.0 for layer in layers])
        for i, layer in enumerate(layers):
            tensors |= {f"{i}.{name}": t for name, t in {**layer.tensors, **layer.vectors}.items()}
        checkpoints.save(path, tensors, about.to_json())
        return about

    def said(self, layers: list[Layer], gap: float) -> NeuronAbout:
        """What the file says of itself; of its cost nothing yet."""
        o, source, spec = self.options, self.pack.source, self.options.predictor
        each = list(enumerate(layers))
        matrices = {f"{i}.{name}": m for i, layer in each for name, m in layer.matrices.items()}
        vectors = {f"{i}.{name}": len(v) for i, layer in each for name, v in layer.vectors.items()}
        exact = is_exact(spec, self.pack.description.activation)
        fires, missed = _mean([x.fires for x in layers]), _mean([x.missed for x in layers])
        return NeuronAbout(
            KIND, VERSION, source.identity, source.layout, self.order, self.bundles.bundle,
            self.bundles.count, spec, exact, o.share, fires, missed, matrices, vectors,
            choose=parse(o.choose).by, gap=round(gap, 4), runs=_mean([x.runs for x in layers]),
        )  # fmt: skip


def _mean(numbers: list[float]) -> float:
    return round(sum(numbers) / len(numbers), 6)


def _with_cost(
    path: Path, layers: list[Layer], about: NeuronAbout, work: Work, progress: Progress
) -> NeuronAbout:
    """The file again, with what it costs."""
    found, file = {}, str(path.absolute())  # which is never a word as `off`
    for neurons, what in (("off", "perplexity before"), (file, "perplexity after")):
        with _opened(work, neurons) as model:
            found[neurons], count = perplexity(model, work.words.held_out_BT, what, progress)
    about = replace(
        about, tokens=count, perplexity_before=round(found["off"], 4),
        perplexity=round(found[file], 4), text=work.words.text[:80],
    )  # fmt: skip
    return work.write(path, layers, about)


def _opened(work: Work, neurons: str) -> Model:
    name = work.pack.path
    return loading.load(
        name,
        memory=work.options.memory,
        draft="none",
        prefix_cache="off",
        neurons=neurons,
        quiet=True,
    )


def _table(layers: list[Layer], about: NeuronAbout, bundles: Bundles) -> Iterator[str]:
    yield f"{'layer':>6}{'fire':>8}{'missed':>8}{'energy kept':>13}{'KB a token':>12}"
    total = 0.0
    for i, layer in enumerate(layers):
        form = next(t.form for t in bundles.tables if i in t.layers)
        size = layer.fires * form.count * form.stride
        total += size
        yield f"{i:>6}{layer.fires:>8.1%}{layer.missed:>8.1%}{layer.kept:>13.1%}{size / 1e3:>12,.0f}"
    dense = sum(t.dense.size for t in bundles.tables)
    yield (
        f"bundles are chosen by {about.choose}: {about.runs * len(layers):,.0f} reads a token if none are in "
        f"memory, each of which costs as much as {about.gap:.2g} bundles read along"
    )
    yield (
        f"feed-forwards: {total / 1e6:,.1f} MB a token of {dense / 1e6:,.1f} MB if none are in memory; "
        f"{about.fires:.0%} of bundles fire, {about.missed:.0%} of those worth computing are missed"
    )
    yield about.cost
