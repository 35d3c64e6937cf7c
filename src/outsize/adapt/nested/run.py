"""`outsize adapt nested`: order a dense model's neurons, cut its feed-forwards into nested experts, train
routers (and corrections), measure the family, and write the add-on beside the pack."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from outsize.adapt import checkpoints, loop
from outsize.adapt.nested import tuned
from outsize.adapt.nested.cut import cut
from outsize.adapt.nested.family import MOST, Measured, measure, rising, table, thresholds
from outsize.adapt.nested.order import SCORES, by_importance
from outsize.adapt.nested.prefixes import ffns
from outsize.adapt.nested.task import NestedRecipe, NestedTask, Widths
from outsize.adapt.nested.tune import TuneRecipe
from outsize.adapt.nested.tuned import Tuned, Tuning
from outsize.adapt.run import held
from outsize.adapt.sparsity.words import Words, spread, words
from outsize.adapt.trainable import TrainableModel, number_type
from outsize.arguments import whole
from outsize.engine import load as loading
from outsize.errors import AdapterError, OptionError
from outsize.kernels.plain import PLAIN
from outsize.model.width import Correction, LayerRouter
from outsize.options import LoadOptions
from outsize.pack import fetch, increments, nested_file
from outsize.pack.format import Pack
from outsize.pack.increments import BLOCK
from outsize.pack.nested_file import BIAS, KIND, ROUTER, USE, VERSION, A, B, C, NestedAbout
from outsize.plan import decide
from outsize.plan.warmup import runtime_bytes
from outsize.progress import Progress, bars, steps
from outsize.system import memory

MOST_PIECES = 64
SHARE = re.compile(r"\d{1,6}(/\d{1,6})?|\d{0,6}\.\d{1,20}", re.ASCII)  # a share: 1/3, .75
ORDERED_ON = 16  # sequences


@dataclass(frozen=True, slots=True)
class NestedOptions:
    """What to cut, and how routers are trained."""

    model: str
    data: tuple[Path, ...]
    widths: str = "1/4,1/2,3/4,1"
    importance: str = "norm"
    blocks: bool = False  # order by blocks of 32 neurons, whose codes are kept
    tokens: int = 32768  # that are read of the data
    every: int = 50  # steps between checkpoints
    resume: bool = False
    quiet: bool = False
    until: int | None = None  # of the steps of tuning, after which it ends
    memory: str | int = "auto"  # of the run that measures the family

    def __post_init__(self) -> None:
        pieces_of(self.widths)
        whole("tokens", self.tokens, 1, 1 << 30)
        whole("every", self.every, 1, 1 << 30)
        if self.until is not None:
            whole("tune_until", self.until, 0, 1 << 30)
        if self.importance not in SCORES:
            raise OptionError(f"importance is {self.importance!r}; known are {', '.join(SCORES)}")


@dataclass(frozen=True, slots=True)
class Made:
    """The pack, its add-on, and the table that is shown of it."""

    pack: Pack
    path: Path
    about: NestedAbout
    table: tuple[str, ...]


def pieces_of(text: str) -> tuple[int, ...]:
    """How many pieces each width has; the last are all. Raises OptionError."""
    parts = [part.strip() for part in text.split(",")]
    try:
        found = [Fraction(part) for part in parts if SHARE.fullmatch(part)]
    except ZeroDivisionError:
        found = []
    rises = all(a < b for a, b in pairwise((Fraction(), *found)))
    if len(found) < max(2, len(parts)) or not rises or found[-1] != 1:
        raise OptionError(
            f"widths is {text[:80]!r}; two or more shares that rise and end in 1 are expected, as "
            "1/4,1/2,3/4,1"
        )
    count = math.lcm(*(f.denominator for f in found))
    if count > MOST_PIECES:
        raise OptionError(
            f"widths is {text[:80]!r}: that takes pieces of 1/{count}, and 1/{MOST_PIECES} is the "
            "smallest; give widths of a larger common part"
        )
    return tuple(int(f * count) for f in found)


def run(options: NestedOptions, recipe: NestedRecipe, tuning: TuneRecipe | None = None) -> Made:
    """Raises OptionError, UnsupportedError, BudgetError, DataError, AdapterError, PackError,
    DiskFullError."""
    base = fetch.find(options.model) or fetch.pack(options.model, quiet=options.quiet)
    _check(options, recipe, tuning, base)
    found = words(base, options.data, options.tokens)
    if tuning is not None:
        tuned.check(base, tuning, found.ids_BT.shape[1], memory.parse(options.memory))
    if options.memory != "auto":  # the run that measures has no less to hold than the base's
        load = LoadOptions(memory=options.memory, draft="none", prefix_cache="off", quiet=True)
        size = memory.parse(options.memory)
        decide.foresee(str(base.path), load, size, runtime_bytes(PLAIN))
    with _alone(base, pieces_of(options.widths)[-1]):
        return _run(options, recipe, tuning, base, found)


def _check(
    options: NestedOptions, recipe: NestedRecipe, tuning: TuneRecipe | None, base: Pack
) -> None:
    """Raises what cannot be, before anything is computed."""
    increments.check(base, pieces_of(options.widths)[-1])
    if options.until is not None and (tuning is None or tuning.steps == 0):
        raise OptionError("tune_until is for --tune, which is not given; leave it out")
    if recipe.rank > base.description.width:
        raise OptionError(
            f"rank is {recipe.rank:,}, and {base.path.name} has {base.description.width:,} numbers a token: "
            "more do nothing; give fewer"
        )


@contextmanager
def _alone(base: Pack, count: int) -> Iterator[None]:
    """While the files of so many pieces are written. Raises OptionError."""
    path = tuned.checkpoint_of(base, count).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    said = f"another process makes nested experts of {base.path.name}; wait for its end"
    with held(path, said):
        yield


def _run(
    options: NestedOptions,
    recipe: NestedRecipe,
    tuning: TuneRecipe | None,
    base: Pack,
    found: Words,
) -> Made:
    began, pieces = time.monotonic(), pieces_of(options.widths)
    is_tuned = tuning is not None and tuning.steps > 0
    device = torch.device("cpu")
    kind = number_type(base, device)
    with bars(options.quiet) as progress:
        model = TrainableModel(base, device, kind, progress)
        block = BLOCK if options.blocks else 1
        order = by_importance(model, spread(found.ids_BT, ORDERED_ON), options.importance, block)
    digest = increments.Pieces(base, pieces[-1], order).digest
    widths = Widths(pieces, base.description.ffn_width // pieces[-1], digest)
    made: Tuned | None = None
    if tuning is not None and is_tuned:
        how = Tuning(tuning, options.every, options.resume, options.quiet, options.until)
        made = tuned.tuned(how, (base, model), order, widths, found)
    with bars(options.quiet) as progress:
        pack = cut(base, pieces[-1], order, progress, None if made is None else made.learned)
    _make_way(pack)
    task = NestedTask(recipe, model, ffns(pack, kind), widths, (found.ids_BT, found.held_out_BT))
    if made is not None:
        task.begin_from(*made.routers)
    training = _trained(options, task, pack, found, is_tuned)
    wanted, tensors, level, step = thresholds(task), _tensors(task), task.level, training.step
    trained_tokens = step * recipe.batch * found.ids_BT.shape[1] + (
        0 if made is None else made.tokens
    )
    del training, task, model, made
    with steps(options.quiet) as draw:
        family = _measured(pack, tensors, pieces, (wanted, found), options, draw)
    minutes = (time.monotonic() - began) / 60
    about = NestedAbout(
        KIND, VERSION, pack.source.identity, pack.source.layout, pieces[-1], pieces, recipe.rank,
        recipe.labels, level, tuple(m.member for m in family[:-1]), family[-1].member.perplexity,
        _predicted(found), found.text[:80], trained_tokens, round(minutes, 2), recipe.seed,
    )  # fmt: skip
    path = nested_file.beside(pack)
    uses = torch.stack([m.use_LN for m in family[:-1]])
    checkpoints.save(path, {**tensors, USE: uses}, about.to_json())
    _checkpoint(pack).unlink(missing_ok=True)
    if is_tuned and options.until is None:
        tuned.checkpoint_of(base, pieces[-1]).unlink(missing_ok=True)
    experts = sum(t.size for t in pack.tables if t.kind == "experts")
    beside = sum(t.size for t in pack.tables if t.kind == "layers")
    beside += pack.table_of("embed" if pack.description.tied else "head").size
    return Made(pack, path, about, tuple(table(family, (experts, beside))))


def _make_way(pack: Pack) -> None:
    """Remove an add-on that is damaged, or another pack's: the pack could not be opened, and measured."""
    try:
        nested_file.of_pack(pack)
    except AdapterError:
        nested_file.beside(pack).unlink(missing_ok=True)


def _checkpoint(pack: Pack) -> Path:
    path = nested_file.beside(pack)
    return path.with_name(path.name + ".checkpoint")


def _predicted(found: Words) -> int:
    some = spread(found.held_out_BT, MOST)
    return some.numel() - len(some)


def _trained(
    options: NestedOptions, task: NestedTask, pack: Pack, found: Words, is_tuned: bool
) -> loop.Training:
    """Routers, trained to the recipe's end. Raises AdapterError, OptionError."""
    path, about = _checkpoint(pack), (pack.source.sha256, found.fingerprint)
    goes_on = options.resume and (path.is_file() or not is_tuned)
    checkpoints.check(goes_on, path)
    training = loop.resume(task, path, *about) if goes_on else loop.start(task, *about)
    with steps(options.quiet) as draw:

        def report(now: loop.Training) -> None:
            draw(f"loss {now.loss:.3f}, {now.summary()}", now.step, task.recipe.steps)

        loop.train(training, path, options.every, report)
    return training


def _tensors(task: NestedTask) -> dict[str, Tensor]:
    """What the file keeps of a task."""
    router, bias = task.routers
    rest = {n: t.detach() for n, t in task.parameters.items() if n in (A, B, C)}
    return {ROUTER: router, BIAS: bias, **rest}


def _measured(
    pack: Pack,
    tensors: dict[str, Tensor],
    pieces: tuple[int, ...],
    what: tuple[list[float], Words],
    options: NestedOptions,
    progress: Progress,
) -> list[Measured]:
    """The family, by the engine; the last is the whole model."""
    with loading.load(
        pack.path, memory=options.memory, draft="none", prefix_cache="off", quiet=True
    ) as model:
        model.transformer.nested.routers = routers(tensors, pieces)
        found = measure(model, what[1].held_out_BT, what[0], progress)
    return [*rising(found[:-1]), found[-1]]


def routers(tensors: dict[str, Tensor], pieces: tuple[int, ...]) -> list[LayerRouter]:
    """One a layer."""
    out = []
    for i, (w, b) in enumerate(zip(tensors[ROUTER], tensors[BIAS], strict=True)):
        parts = [tensors[name][i] for name in (A, B, C) if name in tensors]
        fixes = tuple(Correction(*each) for each in zip(*parts, strict=True)) if parts else ()
        out.append(LayerRouter(w.contiguous(), b, pieces, fixes))
    return out
