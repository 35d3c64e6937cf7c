"""`outsize adapt feature`: a LoRA adapter that learns answers, over a pack as it runs; begun from nothing, or
from an adapter that repairs the pack, whose place it takes (as in arXiv 2407.21075)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from outsize.adapt import training_peak
from outsize.adapt.change import AS_IS
from outsize.adapt.distill import data as texts
from outsize.adapt.distill import factors
from outsize.adapt.distill.data import Data
from outsize.adapt.distill.factors import Factors, LoraStudent
from outsize.adapt.distill.task import DistillRecipe, DistillTask
from outsize.adapt.distill.work import distilling
from outsize.adapt.examples import TrainOptions, fingerprint
from outsize.adapt.run import done, opened, session, train
from outsize.adapt.trainable import TrainableModel
from outsize.checkpoint import lora as files
from outsize.errors import DataError, OptionError
from outsize.log import say
from outsize.model.lora import check_shapes
from outsize.pack import fetch
from outsize.pack.format import Pack

RANK = 8


@dataclass(frozen=True, slots=True)
class FeatureOptions:
    """What is trained. `begun`: from which adapter; `rank`: of one that begins from nothing."""

    train: TrainOptions
    recipe: DistillRecipe
    begun: Path | None = None
    rank: int | None = None


def feature(options: FeatureOptions) -> None:
    """Raises OptionError, AdapterError, DataError and what finding a model raises."""
    pack = fetch.find(options.train.model) or fetch.pack(
        options.train.model, quiet=options.train.quiet
    )
    if wrong := [path for path in options.train.data if ".jsonl" not in path.suffixes]:
        raise DataError(f"{wrong[0]} is no .jsonl; a feature learns from prompts with answers")
    begun = _begun(options, pack)
    rank = max(a.shape[0] for name, a in begun.items() if name.endswith(".A"))
    d, learning = pack.description, training_peak.learning_of(pack.description, rank)
    with session(options.train) as (where, device):
        training_peak.check((pack,), distilling(d, options.recipe, learning, where), where)
        model = opened(pack, where, device)
        found = texts.load(where, options.recipe.length, pack, model)
        task = FeatureTask(options.recipe, model, LoraStudent(model, begun, "feature"), found)
        print_of = fingerprint([found.train, list(found.held_out.values()), str(options.begun)])
        before = task.perplexity(None)
        training = train(task, where, pack.source.sha256, print_of)
        training.write(where.output)
        done(where)
        if not where.quiet:
            count = len(found.held_out["answers"])
            say(
                f"wrote {where.output} ({where.output.stat().st_size / 1e6:.1f} MB): perplexity of {count} "
                f"held-out answers {before:,.3f} -> {task.perplexity(training.step):,.3f}; use it with "
                f"{task.use}{where.output}"
            )


def _begun(options: FeatureOptions, pack: Pack) -> Factors:
    """What the factors begin as. Raises AdapterError, OptionError."""
    d = pack.description
    if options.begun is None:
        rank = RANK if options.rank is None else options.rank
        factors.check_rank(d, rank)
        return factors.nothing(d, rank, options.recipe.seed)
    if options.rank is not None:
        raise OptionError(f"rank is {options.rank}, but {options.begun} has one; leave it out")
    return factors_of(options.begun, pack, options.recipe.seed)


def factors_of(path: Path, pack: Pack, seed: int) -> Factors:
    """An adapter's factors, with such that add nothing for maps that it leaves alone. Raises AdapterError."""
    d, file = pack.description, files.load(path)
    files.same_base(file, pack.source.sha256, pack.path.name)
    found = files.Factors(file, d.head_dim)
    check_shapes(str(path), d, found.shapes)
    files.finite(file, [f"{name}.{f}" for name in found for f in "AB"])
    rank = max(a[0] for a, _ in found.shapes.values())
    made = factors.nothing(d, rank, seed)
    for name, (a, b) in ((name, found[name]) for name in found):
        made[f"{name}.A"], made[f"{name}.B"] = a.float(), b.float() * file.scale
    return made


class FeatureTask(DistillTask):
    """A `Task` of the training loop: the answers' own tokens are learned, and the model is its own teacher in
    nothing."""

    def __init__(
        self, recipe: DistillRecipe, model: TrainableModel, student: LoraStudent, data: Data
    ) -> None:
        super().__init__(recipe, model, student, data)

    def evaluate(self) -> dict[str, float]:
        """Perplexity of held-out answers."""
        return {"held_out_perplexity": round(self.perplexity(self.recipe.steps), 4)}

    def perplexity(self, step: int | None) -> float:
        """Of held-out answers, under the model alone where no step was taken."""
        change = self.student.change(None) if step else AS_IS
        return self.measure(change)["answers"].perplexity
