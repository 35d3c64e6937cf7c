"""`outsize adapt align`: a LoRA adapter that learns from what a program checks: by MDLOO, or by what the best
of a committee answered (rejection sampling)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from outsize.adapt import training_peak
from outsize.adapt.align import task_file
from outsize.adapt.align.mdloo import MEASURED, AlignRecipe, AlignTask, Asked
from outsize.adapt.align.task_file import TaskFile
from outsize.adapt.change import AS_IS, Change
from outsize.adapt.distill.data import Data
from outsize.adapt.distill.factors import Factors, LoraStudent, check_rank, nothing
from outsize.adapt.distill.feature import FeatureTask, factors_of
from outsize.adapt.distill.task import DistillRecipe
from outsize.adapt.examples import Example, TrainOptions, fingerprint
from outsize.adapt.processes import processes
from outsize.adapt.run import done, opened, session, train
from outsize.adapt.trainable import TrainableModel
from outsize.engine import open_tokens
from outsize.errors import DataError, OptionError
from outsize.log import say
from outsize.model_config import Description
from outsize.options import Options
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.text.prompt import encode

METHODS = ("mdloo", "reject")


@dataclass(frozen=True, slots=True)
class AlignOptions:
    """What is learned. `method`: "mdloo", or "reject": the passing answers of a committee (the model, and
    these adapters of it) are learned as examples."""

    train: TrainOptions
    recipe: AlignRecipe
    task: Path
    method: str = "mdloo"
    members: Mapping[str, Path] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"method is {self.method!r}; known are {', '.join(METHODS)}")
        if self.members and self.method != "reject":
            raise OptionError("members are of a committee; give method reject, or leave them out")


@dataclass(frozen=True, slots=True)
class Aligned:
    """Share of answers to held-out prompts that pass, before and after; the adapter."""

    before: float
    after: float
    adapter: Path
    steps: int


def align(options: AlignOptions) -> Aligned:
    """Raises OptionError, DataError, AdapterError and what finding a model raises."""
    told = task_file.read(options.task)
    model = options.train.model
    pack = fetch.find(model) or fetch.pack(model, quiet=options.train.quiet)
    check_rank(pack.description, options.recipe.rank)
    learning = training_peak.learning_of(pack.description, options.recipe.rank)
    work = work_of(options.recipe, pack.description, learning)
    members = {n: factors_of(path, pack, 0) for n, path in (options.members or {}).items()}
    with session(options.train) as (where, device):
        training_peak.check((pack,), work, where)
        world = processes()[1]
        if options.recipe.batch % world:
            raise OptionError(
                f"batch is {options.recipe.batch} prompts for {world} processes; give as many to each"
            )
        made = opened(pack, where, device)
        task = task_of(options.recipe, pack, made, told)
        options = replace(options, train=where)
        result = _learn(options, pack, task, told, members)
        if not where.quiet:
            say(
                f"wrote {where.output}: {told.name}, {result.before:.1%} -> {result.after:.1%} of answers to "
                f"{len(told.held_out)} held-out prompts pass; use it with {task.use}{where.output}"
            )
        return result


def work_of(recipe: AlignRecipe, d: Description, learning: int) -> training_peak.Work:
    """Answers are drawn, and learned from, all at once."""
    length = min(recipe.length, d.context)
    drawn = training_peak.Pass(recipe.batch * max(recipe.samples, MEASURED), length, length, True)
    samples = recipe.batch * recipe.samples
    return training_peak.Work(samples, length, length, learning, between=(drawn,))


def task_of(recipe: AlignRecipe, pack: Pack, model: TrainableModel, told: TaskFile) -> AlignTask:
    """Raises DataError where a prompt and its answer do not fit."""
    tokens = open_tokens.tokens(pack)
    every = (*told.train, *told.held_out)
    ids = encode(pack, tokens, [p.text for p in every], Options())
    longest = max(map(len, ids))
    if longest + recipe.max_tokens > min(recipe.length, pack.description.context):
        raise DataError(
            f"a prompt of {longest:,} tokens and an answer of {recipe.max_tokens:,} are more than "
            f"{recipe.length:,}; give a larger --length, or a smaller --max-tokens"
        )
    asked = [Asked(list(i), n, p) for n, (i, p) in enumerate(zip(ids, every, strict=True))]
    cut = len(told.train)
    student = LoraStudent(model, nothing(pack.description, recipe.rank, recipe.seed), "aligned")
    ends = frozenset(pack.eos)
    return AlignTask(recipe, student, (asked[:cut], asked[cut:]), tokens.decode, ends)


def _learn(
    options: AlignOptions,
    pack: Pack,
    task: AlignTask,
    told: TaskFile,
    members: Mapping[str, Factors],
) -> Aligned:
    where, base = options.train, pack.source.sha256
    before = task.pass_rate(AS_IS)
    if options.method == "reject":
        data = Data(committee(task, members), {})
        r = options.recipe
        recipe = DistillRecipe(r.steps, r.batch, r.rate, length=r.length, seed=r.seed, loss="ce")
        learner = _Imitation(recipe, task, data)
        training = train(learner, where, base, fingerprint([told.sha256, list(data.train)]))
    else:
        training = train(task, where, base, told.sha256)
    training.write(where.output)
    done(where)
    after = task.pass_rate(task.student.change(None))
    return Aligned(before, after, where.output, training.step)


def committee(task: AlignTask, members: Mapping[str, Factors]) -> list[Example]:
    """Of each prompt the shortest answer that passes, of all that the model and its adapters gave. Raises
    DataError where there is none at all."""
    model, r = task.student.model, task.recipe
    changes: list[Change] = [AS_IS]
    changes += [LoraStudent(model, f, name).change(None) for name, f in members.items()]
    found = list[Example]()
    for i in range(0, len(task.asked), r.batch):
        some = task.asked[i : i + r.batch]
        given: list[list[list[int]]] = [[] for _ in some]
        for number, change in enumerate(changes):
            with torch.no_grad():
                drawn = task.draw(some, r.samples, r.seed + 104_729 * number, change)
            for answers, more in zip(given, drawn, strict=True):
                answers += more
        found += _best(task, some, given)
    if not found:
        raise DataError(
            f"of {len(task.asked)} prompts none has an answer that passes, of {r.samples * len(changes)} "
            "each; give easier ones, or more --samples"
        )
    return found


def _best(
    task: AlignTask, some: Sequence[Asked], given: Sequence[Sequence[list[int]]]
) -> list[Example]:
    out = []
    for a, answers in zip(some, given, strict=True):
        passed = zip(answers, task.passes(a, answers), strict=True)
        good = sorted((t for t, reward in passed if reward), key=lambda t: (len(t), t))
        if good:
            out.append(Example(a.tokens + good[0], len(a.tokens)))
    return out


class _Imitation(FeatureTask):
    """Learns the committee's answers; measured as alignment is."""

    def __init__(self, recipe: DistillRecipe, aligned: AlignTask, data: Data) -> None:
        super().__init__(recipe, aligned.student.model, aligned.student, data)
        self._aligned = aligned

    def evaluate(self) -> dict[str, float]:
        return self._aligned.evaluate()
