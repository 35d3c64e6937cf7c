"""Feed-forwards that are tuned before they are cut: refitted in closed form, then trained; kept in a
checkpoint and gone on from, with a line of figures for each time that they were judged."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from outsize.adapt import checkpoints, loop
from outsize.adapt.divergence import divergence, following
from outsize.adapt.nested.cut import Learned
from outsize.adapt.nested.prefixes import Ffn, Prefixes, in_order, widest
from outsize.adapt.nested.refit import refitted
from outsize.adapt.nested.task import Widths
from outsize.adapt.nested.tune import TuneRecipe, TuneTask
from outsize.adapt.repack import bits_of
from outsize.adapt.sparsity.words import Words, spread
from outsize.adapt.statistics import bf16_products, causal
from outsize.adapt.trainable import TrainableModel
from outsize.adapt.training_peak import Pass, Work, peak_bytes
from outsize.encoding.find import encoding
from outsize.errors import BudgetError
from outsize.home import home
from outsize.pack.format import Pack, Quality
from outsize.pack.increments import dense_tables, learned_encoding
from outsize.progress import steps

BEGUN = 4  # bytes of a number that learns: as the closed form begins, and gave it
HELD = 4  # held-out sequences that all of the feed-forwards are judged on


@dataclass(frozen=True, slots=True)
class Tuning:
    """How, and how it is kept."""

    recipe: TuneRecipe
    every: int
    resume: bool
    quiet: bool
    until: int | None = None  # of the steps, after which training ends: it can go on later


@dataclass(frozen=True, slots=True)
class Tuned:
    """Feed-forwards, the routers that were trained with them (L, M, D) and (L, M), and how many tokens they
    were trained on."""

    learned: Learned
    routers: tuple[Tensor, Tensor]
    tokens: int


def checkpoint_of(base: Pack, count: int) -> Path:
    return home() / "adapt" / f"{base.path.name}-nested{count}.tuning.checkpoint"


def history_of(base: Pack, count: int) -> Path:
    """A line for each time that training was judged."""
    return checkpoint_of(base, count).with_suffix(".jsonl")


def check(base: Pack, recipe: TuneRecipe, length: int, budget: int) -> None:
    """Refuse what is known not to fit. Raises BudgetError."""
    d = base.description
    numbers = 3 * d.num_layers * d.ffn_width * d.width
    work = Work(
        recipe.batch, length, length, numbers, numbers, between=(Pass(HELD, length, length),)
    )
    need = peak_bytes((base,), work) + BEGUN * numbers
    if recipe.steps and need > budget:
        raise BudgetError(
            f"tuning the feed-forwards of {base.path.name} takes about {need / 1e6:,.0f} MB of memory, and "
            f"{budget / 1e6:,.0f} MB may be used; give a larger --memory, or leave out --tune"
        )


def tuned(
    how: Tuning,
    of: tuple[Pack, TrainableModel],
    order_LF: Tensor,
    widths: Widths,
    found: Words,
) -> Tuned:
    """Trained to the recipe's end, on from the checkpoint where it is to be resumed. Raises AdapterError,
    OptionError, DiskFullError."""
    (base, model), count = of, widths.pieces[-1]
    path, history = checkpoint_of(base, count), history_of(base, count)
    checkpoints.check(how.resume, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = in_order(model, order_LF)
    ffns = begun if how.resume else refitted(model, begun, widths.ends, found.ids_BT)
    task = TuneTask(how.recipe, model, ffns, widths, (found.ids_BT, found.held_out_BT))
    about = base.source.sha256, found.fingerprint
    training = loop.resume(task, path, *about) if how.resume else loop.start(task, *about)
    if not how.resume:
        history.unlink(missing_ok=True)
    _train(how, training, path, history, found.ids_BT.shape[1])
    made, routers = _kept(task.parameters, base), task.routers
    tokens = training.step * how.recipe.batch * found.ids_BT.shape[1]
    del task, training, begun, ffns  # before as much is made again
    return Tuned(Learned(made, _quality(base, model, made, widths, found)), routers, tokens)


def _train(how: Tuning, training: loop.Training, path: Path, history: Path, length: int) -> None:
    recipe, first, begun = how.recipe, training.step, time.process_time()
    with steps(how.quiet) as draw:

        def report(now: loop.Training) -> None:
            draw(f"tuning: loss {now.loss:.3f}, {now.summary()}", now.step, recipe.steps)
            if now.step % how.every and now.step not in (0, how.until, recipe.steps):
                return
            row = {
                "step": now.step, "steps": recipe.steps, "loss": now.loss,
                "tokens": now.step * length * recipe.batch,
                "steps_since": now.step - first, "processor_s": time.process_time() - begun, **now.figures,
            }  # fmt: skip
            with history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

        if not first:  # what the closed form gave
            training.figures = training.task.evaluate()
            report(training)
        loop.train(training, path, how.every, report, how.until)


def _kept(parameters: dict[str, Tensor], base: Pack) -> list[Ffn]:
    """By layer, in fp32, as their encodings keep them."""
    names = {i: t.tensors["down"][0].encoding for t in dense_tables(base) for i in t.keys}
    out = []
    for layer in range(base.description.num_layers):
        kind = encoding(learned_encoding(names[layer]))
        pair = (parameters[f"{layer}.{name}"].detach() for name in ("gate_up", "down"))
        out.append(Ffn(*(kind.decode(kind.encode(w))[: len(w)] for w in pair)))
    return out


@torch.no_grad()
def _quality(
    base: Pack, model: TrainableModel, made: list[Ffn], widths: Widths, found: Words
) -> Quality:
    """Of all of the feed-forwards, as they are kept."""
    kept = [Ffn(*(w.to(model.dtype) for w in f)) for f in made]
    ids_BT = spread(found.held_out_BT, HELD)
    with bf16_products():
        former, _ = model.run(causal(model.embed(ids_BT)))
        seen = Prefixes(model, kept, widths.ends, widest(len(widths.pieces)))
        states, _ = model.run(causal(model.embed(ids_BT)), change=seen)
    rows = former.flatten(0, 1), states.flatten(0, 1)
    said = divergence(model, *rows, following(ids_BT).flatten())
    return Quality(bits_of(base), *said, ids_BT.numel() - len(ids_BT), found.text[:80])
