"""Paged neurons in a plan: which add-on file is meant, whether it fits the pack and the other options,
what it takes, and whether it pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from outsize.draft.spec import parse_draft
from outsize.errors import BudgetError, OptionError, UnsupportedError
from outsize.home import expanded
from outsize.options import LoadOptions
from outsize.pack import neuron_file
from outsize.pack.format import Pack
from outsize.pack.neuron_file import CHUNKS, FIRING, SUFFIX, NeuronFile
from outsize.pack.outline import Outline, PagedNeurons
from outsize.plan.cost import NeuronReads, firing, neuron_reads, used_bytes
from outsize.plan.placement import BY_ROUTER, Placement
from outsize.weights.bundles import Bundles, find
from outsize.weights.neuron_spec import (
    AUTO,
    DEFAULT,
    OF_CHUNKS,
    OFF,
    RESIDENT,
    NeuronSpec,
    parse_neurons,
)

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Decide = Callable[[Outline], Placement]


@dataclass(frozen=True, slots=True)
class NeuronPlan:
    """What was found for `--neurons`."""

    spec: NeuronSpec
    file: NeuronFile
    bundles: Bundles


def search(options: LoadOptions, pack: Pack | None, name: str) -> NeuronPlan | None:
    """The add-on file that the options mean, read and checked. Raises AdapterError, OptionError, PackError,
    UnsupportedError."""
    spec = parse_neurons(options.neurons)
    if spec.file == OFF:
        return None
    if pack is not None and pack.description.mixture is not None:
        if spec.file == AUTO:
            return None
        raise OptionError(
            f"neurons is {options.neurons!r}, and {name} is a mixture of experts, which are paged as they "
            "are; leave it out, and see --experts"
        )
    if pack is None:
        if spec.file == AUTO:
            return None
        raise OptionError(
            f"neurons is {options.neurons!r}, and {name} is not packed here: such a file is for one pack; "
            "make it with `outsize adapt sparsity`, or leave --neurons out"
        )
    beside = pack.path.with_name(pack.path.name + SUFFIX)
    path = beside if spec.file == AUTO else expanded(spec.file)
    if spec.file == AUTO and (not path.is_file() or _clash(options)):
        return None
    if clash := _clash(options):
        raise OptionError(f"neurons is {options.neurons!r}, and {clash}; leave one of them out")
    return _checked(spec, path, pack)


def _checked(spec: NeuronSpec, path: Path, pack: Pack) -> NeuronPlan:
    file = neuron_file.read(path, pack.description.num_layers)
    neuron_file.check_pack(file, pack.source.identity, pack.source.layout, pack.path.name)
    if not pack.description.is_measured:  # what no file can be made for
        raise UnsupportedError(
            f"{pack.path.name} is a {pack.description.family} model, whose neurons are not paged; leave "
            "--neurons out"
        )
    return NeuronPlan(spec, file, find(pack, file.about.bundle, file.about.order))


def _clash(options: LoadOptions) -> str:
    """What changes the feed-forward's numbers, which thresholds were not measured for."""
    if options.adapters:
        return "adapters change which neurons fire"
    if parse_draft(options.draft).kind == "mtp":
        return "draft is mtp, whose mask tokens run through adapters"
    return ""


def with_neurons(o: Outline, found: NeuronPlan) -> Outline:
    """The outline of a model whose neurons are paged."""
    tables = tuple(t.bundles for t in found.bundles.tables)
    rooms = sum(t.form.room for t in found.bundles.tables)
    rooms += max(t.form.room for t in found.bundles.tables)  # fields on their way there
    shared = sum(t.shared.size for t in found.bundles.tables)
    about = found.file.about
    paged = PagedNeurons(
        rooms + shared + found.file.size, about.fires, _hit_rates(found.file), about.cost,
        runs=about.runs, gap=about.gap, computes=_computes(found.bundles, about.fires),
    )  # fmt: skip
    return replace(o, tables=(*o.tables, *tables), neurons=paged)


def _computes(bundles: Bundles, fires: float) -> float:
    """Of a dense feed-forward's time: gate and up of what fires; and of down what fires where it is kept by
    rows, else all of it, which zeros go through."""
    form = bundles.tables[0].form
    down = 1.0 if form.down is not None else fires
    return (form.halves * fires + down) / (form.halves + 1)


def _hit_rates(file: NeuronFile) -> tuple[tuple[float, float], ...]:
    """If the bundles that fire most stay: what a cache reaches at least in the long run."""
    often, _ = torch.sort(file.numbers(FIRING).clamp(0, 1).flatten(), descending=True)
    asked = often.cumsum(0) / often.sum().clamp_min(1e-30)
    count = len(often)
    return tuple((s, min(1.0, float(asked[max(0, int(s * count) - 1)]))) for s in SHARES)


def told(found: NeuronPlan) -> str:
    """Which neurons are computed, and what that costs, in words."""
    about, more = found.file.about, ""
    if found.spec.mode == RESIDENT:
        more = " and what is in memory"
    how = f"{about.predictor} in {CHUNKS}" if about.choose == CHUNKS else about.predictor
    return f"{about.fires:.0%} of neurons by {how}{more}, {about.cost}"


def _hit_rate(o: Outline, p: Placement) -> float:
    """Of bundles, as expected."""
    missing = sum(size for _, tier, size in p.groups if tier == BY_ROUTER)
    total = sum(t.size for t in o.tables if t.kind == "neurons")
    if o.neurons is None or not total:
        return 1.0
    return firing(o.neurons)(1 - missing / total)[0]


def expected_bytes(o: Outline, p: Placement) -> int:
    """That a token reads from disk."""
    return p.streamed + int(used_bytes(o) * (1 - _hit_rate(o, p)))


def settle(o: Outline, found: NeuronPlan | None, decide: Decide) -> Outline:
    """The outline with paged neurons, and a note of what they bring; without where `auto` finds that they
    do not pay. Raises BudgetError."""
    if found is None:
        return o
    paged = with_neurons(o, found)
    is_asked = found.spec.file != AUTO
    try:
        placement = decide(paged)
    except BudgetError:
        if is_asked:
            raise
        return o
    there, reads, rate = (
        expected_bytes(paged, placement),
        neuron_reads(paged),
        _hit_rate(paged, placement),
    )
    worth = there if reads is None else there + reads.more_bytes(rate)
    try:
        here = decide(o).streamed
    except BudgetError:  # it fits with neurons alone
        here = o.size
    pays = worth < here
    if not pays and not is_asked:
        return o
    said = f"about {there / 1e6:,.1f} MB a token from disk{_counted(reads, rate, worth)} with paged neurons, "
    said += f"{here / 1e6:,.1f} MB without"
    said += "" if pays else ": they do not pay with this --memory; leave --neurons out"
    assert paged.neurons is not None
    return replace(paged, neurons=replace(paged.neurons, note=f"{said} ({found.file.about.cost})"))


def _counted(reads: NeuronReads | None, hit_rate: float, worth: float) -> str:
    """In how many reads."""
    if reads is None or hit_rate == 1:
        return ""
    return f" in {reads.reads(hit_rate):,.0f} reads, as long as {worth / 1e6:,.1f} MB in one,"


def banks_of(paged: NeuronPlan | None) -> tuple[Bundles, str] | None:
    """What is loaded of paged neurons."""
    if paged is None:
        return None
    default = OF_CHUNKS if paged.file.about.choose == CHUNKS else DEFAULT
    return paged.bundles, paged.spec.eviction or default
