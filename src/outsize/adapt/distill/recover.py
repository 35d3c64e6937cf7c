"""`outsize adapt recover`: repairs a pack of few bits against the pack that it was made from: its tables,
which cost nothing when it runs, or low-rank factors beside its maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from outsize.adapt import calibration, peak, rewrite, training_peak
from outsize.adapt.change import AS_IS
from outsize.adapt.distill import data as texts
from outsize.adapt.distill import factors
from outsize.adapt.distill.data import Data
from outsize.adapt.distill.factors import LoraStudent
from outsize.adapt.distill.made import quality
from outsize.adapt.distill.tables import TableStudent
from outsize.adapt.distill.task import DistillRecipe, DistillTask, Student
from outsize.adapt.distill.work import distilling
from outsize.adapt.divergence import Divergence
from outsize.adapt.examples import TrainOptions, fingerprint
from outsize.adapt.processes import processes
from outsize.adapt.run import done, opened, session, train
from outsize.adapt.statistics import Inputs
from outsize.adapt.trainable import TrainableModel, number_type
from outsize.errors import OptionError
from outsize.home import home
from outsize.kernels.plain import PLAIN
from outsize.pack import fetch, store
from outsize.pack.format import Pack, Quality
from outsize.pack.source import derived
from outsize.plan.warmup import runtime_bytes
from outsize.progress import steps
from outsize.storage.records import Records

BEGINS = ("closed", "zero")


@dataclass(frozen=True, slots=True)
class RecoverOptions:
    """What is learned: the tables, or where `rank` is given, factors of it, which begin in closed form or add
    nothing. `source`: what the pack was made from, where that is not found by its name."""

    train: TrainOptions
    recipe: DistillRecipe
    rank: int | None = None
    begin: str = "closed"
    source: str | None = None

    def __post_init__(self) -> None:
        if self.begin not in BEGINS:
            raise OptionError(f"begin is {self.begin!r}; known are {', '.join(BEGINS)}")


@dataclass(frozen=True, slots=True)
class Recovered:
    """What came of it: another pack, or an adapter's file; and divergences from the source, by kind of text:
    before, as training began, and after."""

    pack: Pack
    adapter: Path | None
    before: Mapping[str, Divergence]
    begun: Mapping[str, Divergence]
    after: Mapping[str, Divergence]
    steps: int


def recover(options: RecoverOptions) -> Recovered:
    """Raises OptionError, UnsupportedError, DataError, PackError, AdapterError."""
    pack = fetch.find(options.train.model)
    if pack is None:
        raise OptionError(
            f"{options.train.model} is no pack that is here; recover repairs what `outsize pack --bits` makes"
        )
    source = source_of(pack, options.source)
    if options.rank is not None:
        factors.check_rank(pack.description, options.rank)
    what = "recovered" if options.rank is None else f"recovered-rank{options.rank}"
    placed = texts.placed(options.train, pack, what)
    with session(placed) as (where, device), Records(pack) as own:
        options = replace(options, train=where)
        _check(options, (pack, source))
        return _recover(options, (pack, source), own, device)


def _check(options: RecoverOptions, packs: tuple[Pack, Pack]) -> None:
    """Refuse what does not fit: training, or to begin in closed form, with both models open."""
    (pack, source), where, fitted = packs, options.train, 0
    d, rank = pack.description, options.rank
    learning = 0 if rank is None else training_peak.learning_of(d, rank)
    work = distilling(d, options.recipe, learning, where)
    if rank is None:
        work = training_peak.on_tables(pack, work)
    elif options.begin == "closed" and not (where.resume or training_peak.on_gpu(where)):
        size = number_type(source, torch.device("cpu")).itemsize
        fitted = peak.peak_bytes(source, size, runtime_bytes(PLAIN))
        fitted += size * training_peak.numbers(pack)
    training_peak.check(packs, work, where, fitted)


def source_of(pack: Pack, named: str | None) -> Pack:
    """The pack whose numbers one was made from, by however many steps. Raises OptionError where it was made
    from none, or from another."""
    if not pack.source.kin:
        raise OptionError(
            f"{pack.path.name} was made from no other pack, so that there is nothing to repair it by; "
            "recover is for what `outsize pack --bits` makes"
        )
    here = [fetch.find(named)] if named else store.packs(home() / "packs")
    found = [p for p in here if isinstance(p, Pack) and p.source.sha256 in pack.source.kin]
    found = [p for p in found if p.description == pack.description]
    if not found:
        due = " or ".join(sha[:12] for sha in pack.source.kin)
        raise OptionError(
            f"{named or home() / 'packs'} is not, or does not hold, what {pack.path.name} was made from "
            f"({due}); name that pack with --source"
        )
    return max(found, key=lambda p: pack.source.kin.index(p.source.sha256))


def _recover(
    options: RecoverOptions, packs: tuple[Pack, Pack], own: Records, device: torch.device
) -> Recovered:
    (pack, source), where = packs, options.train
    teacher, model = (opened(p, where, device) for p in (source, pack))
    found = texts.load(where, options.recipe.length, source, teacher)
    student = _student(options, packs, model, own, found)
    task = DistillTask(options.recipe, teacher, student, found)
    before, begun = task.measure(AS_IS), task.measure(student.change(None))
    print_of = fingerprint([found.train, list(found.held_out.values())])
    training = train(task, where, pack.source.sha256, print_of)
    after = task.measure(student.change(None))
    training.write(where.output)
    made, adapter = pack, where.output if isinstance(student, LoraStudent) else None
    if isinstance(student, TableStudent):
        made = _repaired(student, pack, own, quality(pack, after, found, where), where)
    done(where)
    return Recovered(made, adapter, before, begun, after, training.step)


def _student(
    options: RecoverOptions,
    packs: tuple[Pack, Pack],
    model: TrainableModel,
    own: Records,
    found: Data,
) -> Student:
    (pack, source), rank, d = packs, options.rank, packs[0].description
    if rank is None:
        return TableStudent(model, pack, own)
    if options.begin == "zero" or options.train.resume:
        return LoraStudent(model, factors.nothing(d, rank, options.recipe.seed), "recovery")
    tokens = [t for e in found.train for t in e.tokens][: calibration.due(d)]
    if len(tokens) < calibration.due(d):
        raise OptionError(
            f"factors in closed form need {calibration.due(d):,} tokens, and --data has {len(tokens):,} to "
            "train on; give more, or --begin zero"
        )
    with steps(options.train.quiet) as draw, Records(source) as whole:
        inputs = Inputs(model, tokens, ())
        made = factors.closed_form(inputs, (whole, own), d, rank, draw)
    return LoraStudent(model, made, "recovery")


def _repaired(
    student: TableStudent, pack: Pack, own: Records, measured: Quality, where: TrainOptions
) -> Pack:
    """The pack with the tables that were learned."""
    recipe = {"made": "recovered tables", "learned": rewrite.digest(student.parameters)}
    source = derived(pack.source, f"{pack.source.encoding}-recovered", recipe)
    with steps(where.quiet) as draw:
        who = rewrite.Identity(source, measured)
        if processes()[0] == 0:
            return rewrite.write(pack, own, student.made(), pack.description, who, draw)
    return pack
