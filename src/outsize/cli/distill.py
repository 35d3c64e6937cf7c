"""`outsize adapt recover`, `feature`, `prune`, `share-kv`: what is distilled or trained over a pack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outsize.cli.command import only, with_flags
from outsize.cli.flags import Flag
from outsize.errors import OptionError
from outsize.options import DEFAULT_MODEL, LoadOptions

if TYPE_CHECKING:
    from outsize.adapt.distill.made import Made
    from outsize.adapt.distill.recover import Recovered
    from outsize.adapt.divergence import Divergence
    from outsize.adapt.examples import TrainOptions


@dataclass(frozen=True, slots=True)
class DataFlags:
    """What to train on, and where."""

    data: Annotated[
        list[Path],
        Flag("--data", "Running text, or prompts as .jsonl (repeatable, both at once)."),
    ]
    output: Annotated[
        Path | None, Flag("-o --output", "What is trained, .safetensors; by default in the home.")
    ] = None
    own_answers: Annotated[
        bool, Flag("--own-answers/--given-answers", "Let the model answer the prompts first.")
    ] = True
    max_tokens: Annotated[int, Flag("-n --max-tokens", "Of an own answer.")] = 128
    at_once: Annotated[int, Flag("--at-once", "Own answers made at once.")] = 16
    every: Annotated[int, Flag("--every", "Steps between checkpoints.")] = 100
    resume: Annotated[bool, Flag("--resume", "Go on from the checkpoint.")] = False
    device: Annotated[str, Flag("--device", "auto, cpu or cuda.")] = "auto"

    def options(self, model: str, load: LoadOptions, given: frozenset[str]) -> TrainOptions:
        """Raises OptionError."""
        from outsize.adapt.examples import TrainOptions

        check_answers(self.own_answers, given)
        told = asdict(self) | {"data": tuple(self.data), "output": self.output or Path()}
        return TrainOptions(model=model, quiet=load.quiet, memory=load.memory, **told)


@dataclass(frozen=True, slots=True)
class DistillFlags:
    """How to distil; fields are those of the recipe."""

    steps: Annotated[int, Flag("--steps", "Steps.")] = 200
    batch: Annotated[int, Flag("--batch", "Sequences a step.")] = 4
    rate: Annotated[float, Flag("--rate", "Highest learning rate.")] = 1e-3
    length: Annotated[int, Flag("--length", "Most tokens of a sequence.")] = 512
    seed: Annotated[int, Flag("--seed", "The same seed trains the same.")] = 0
    loss: Annotated[
        str,
        Flag("--loss", "kl (all of the teacher's predictions), mix (.9 its first choice) or ce."),
    ] = "kl"


@dataclass(frozen=True, slots=True)
class RecoverFlags:
    """What learns."""

    tables: Annotated[
        bool, Flag("--tables", "Levels, steps and norms: no cost at run time (the default).")
    ] = False
    rank: Annotated[
        int | None,
        Flag("--rank", "Low-rank factors instead: an adapter. Try tables first: they are free."),
    ] = None
    begin: Annotated[
        str, Flag("--begin", "Of factors: closed (the error's best ones) or zero.")
    ] = "closed"
    source: Annotated[
        str | None, Flag("--source", "The pack that it was made from, if it is not in the home.")
    ] = None


def check_answers(own: bool, given: frozenset[str]) -> None:
    """Raises OptionError for flags of own answers, where they are given ones."""
    for name in ("max_tokens", "at_once"):
        if name in given and not own:
            flag = name.replace("_", "-")
            raise OptionError(
                f"--{flag} is of own answers; leave it out, or leave --given-answers out"
            )


@with_flags
def recover(
    data: DataFlags,
    recipe: DistillFlags,
    own: RecoverFlags,
    load: Annotated[LoadOptions, only("threads", "quiet", "memory")],
    given: frozenset[str],
    model: Annotated[str, typer.Argument(metavar="PACK")],
) -> None:
    """Repair a pack of few bits against the one that it was made from: another pack, or an adapter."""
    from outsize.adapt.distill.recover import RecoverOptions
    from outsize.adapt.distill.recover import recover as run
    from outsize.adapt.distill.task import DistillRecipe
    from outsize.adapt.processes import is_first
    from outsize.plan.probe import set_threads

    if own.tables and own.rank is not None:
        raise OptionError(f"--tables and --rank {own.rank}: one of them is trained at a time")
    if "begin" in given and own.rank is None:
        raise OptionError("--begin is of low-rank factors; give --rank, or leave it out")
    set_threads(load.threads)
    where = data.options(model, load, given)
    options = RecoverOptions(
        where, DistillRecipe(**asdict(recipe)), own.rank, own.begin, own.source
    )
    made = run(options)
    if not load.quiet and is_first():
        print("\n".join(_lines(made)))


Arms = list[tuple[str, Mapping[str, "Divergence"]]]


def _figures(arms: Arms) -> Iterator[str]:
    """A row for each kind of text and each state."""
    yield f"{'':<26}{'KL':>10}{'top-1':>10}{'perplexity':>12}{'its source':>12}"
    for kind in arms[0][1]:
        for name, found in arms:
            d = found[kind]
            yield (
                f"{kind + ', ' + name:<26}{d.kl:>10.4f}{d.top1:>10.1%}{d.perplexity:>12.3f}"
                f"{d.former_perplexity:>12.3f}"
            )


def _lines(made: Recovered) -> Iterator[str]:
    """The closing table."""
    arms: Arms = [("before", made.before)]
    if any(made.begun[kind] != found for kind, found in made.before.items()):
        arms.append(("in closed form", made.begun))
    arms.append((f"after {made.steps:,} steps", made.after))
    yield from _figures(arms)
    if made.adapter is None:
        yield f"wrote {made.pack.path} (as fast as before): run it with -m {made.pack.path}"
    else:
        size = made.adapter.stat().st_size / 1e6
        yield (
            f"wrote {made.adapter} ({size:.1f} MB more; tables, without --rank, cost none and may do as "
            f"well): run it with -m {made.pack.path} --adapter recovery={made.adapter}, or specialize it: "
            f"outsize adapt feature --from {made.adapter}"
        )


@dataclass(frozen=True, slots=True)
class FeatureFlags:
    """What a feature begins from."""

    begun: Annotated[
        Path | None, Flag("--from", "A recovery adapter of this pack, which it replaces.")
    ] = None
    rank: Annotated[int | None, Flag("--rank", "Of one that begins from nothing.")] = None


@with_flags
def feature(
    data: DataFlags,
    recipe: Annotated[DistillFlags, only("steps", "batch", "rate", "length", "seed")],
    own: FeatureFlags,
    load: Annotated[LoadOptions, only("threads", "quiet", "memory")],
    given: frozenset[str],
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """Train a LoRA adapter on answers (of examples, or those that the model gives itself)."""
    from outsize.adapt.distill.feature import FeatureOptions
    from outsize.adapt.distill.feature import feature as run
    from outsize.adapt.distill.task import DistillRecipe
    from outsize.plan.probe import set_threads

    if data.output is None:
        raise OptionError("where does the adapter go? Give -o FILE.safetensors")
    set_threads(load.threads)
    where = data.options(model, load, given)
    made = DistillRecipe(
        recipe.steps, recipe.batch, recipe.rate, length=recipe.length, seed=recipe.seed, loss="ce"
    )
    run(FeatureOptions(where, made, own.begun, own.rank))


@dataclass(frozen=True, slots=True)
class PruneFlags:
    """What stays of a feed-forward."""

    ffn: Annotated[str, Flag("--ffn", "The share of neurons that stay, as 2/3 or .67.")] = "2/3"
    by: Annotated[
        str, Flag("--by", "What chooses them: magnitude, activation, or soft (learned scores).")
    ] = "activation"
    mask_steps: Annotated[int, Flag("--mask-steps", "Steps that scores are learned in.")] = 100


GENTLY = DistillFlags(rate=3e-4)  # whole matrices learn


@with_flags
def prune(
    data: DataFlags,
    own: PruneFlags,
    load: Annotated[LoadOptions, only("threads", "quiet", "memory")],
    given: frozenset[str],
    recipe: DistillFlags = GENTLY,
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """A pack with fewer neurons in each feed-forward, distilled from the model."""
    from outsize.adapt.distill.prune import PruneOptions
    from outsize.adapt.distill.prune import prune as run
    from outsize.adapt.distill.task import DistillRecipe
    from outsize.plan.probe import set_threads

    if "mask_steps" in given and own.by != "soft":
        raise OptionError(
            f"--mask-steps is of learned scores, and --by is {own.by}; give --by soft"
        )
    set_threads(load.threads)
    where, learned = data.options(model, load, given), DistillRecipe(**asdict(recipe))
    made = run(PruneOptions(where, learned, own.ffn, own.by, own.mask_steps))
    _show(made, load.quiet)


@dataclass(frozen=True, slots=True)
class ShareFlags:
    """Which layers share keys and values."""

    layers: Annotated[int, Flag("--layers", "So many of the last layers make queries alone.")]


@with_flags
def share_kv(
    own: ShareFlags,
    data: DataFlags,
    load: Annotated[LoadOptions, only("threads", "quiet", "memory")],
    given: frozenset[str],
    recipe: DistillFlags = GENTLY,
    model: Annotated[str, typer.Argument()] = DEFAULT_MODEL,
) -> None:
    """A pack whose last layers read an earlier one's keys and values, distilled from the model."""
    from outsize.adapt.distill.share_kv import ShareOptions
    from outsize.adapt.distill.share_kv import share_kv as run
    from outsize.adapt.distill.task import DistillRecipe
    from outsize.plan.probe import set_threads

    set_threads(load.threads)
    where, learned = data.options(model, load, given), DistillRecipe(**asdict(recipe))
    _show(run(ShareOptions(where, learned, own.layers)), load.quiet)


def _show(made: Made, quiet: bool) -> None:
    """The closing table of a pack that was made of another."""
    from outsize.adapt.processes import is_first

    if quiet or not is_first():
        return
    print(
        "\n".join(
            _figures([("untrained", made.begun), (f"after {made.steps:,} steps", made.after)])
        )
    )
    before, now = made.base.size / 1e6, made.pack.size / 1e6
    print(
        f"wrote {made.pack.path} ({before:,.1f} MB -> {now:,.1f} MB, lossy): run it with -m {made.pack.path}"
    )
