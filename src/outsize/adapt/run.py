"""Runs a training task from the command line's options: data, device, checkpoint, file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import filelock
import torch

from outsize.adapt import checkpoints, loop, training_peak
from outsize.adapt.examples import Example, TrainOptions, fingerprint, prepare
from outsize.adapt.processes import join, leave, processes
from outsize.adapt.trainable import TrainableModel, check_usual, number_type
from outsize.errors import OptionError
from outsize.log import say
from outsize.model_config import Description
from outsize.pack import fetch
from outsize.pack.format import Pack
from outsize.pack.lock import locked
from outsize.progress import bars, steps

HELD_OUT_SHARE, HELD_OUT = 50, 64  # one in so many, at most so many
# A task for a model, its examples to train on, and those held out.
MakeTask = Callable[[TrainableModel, Sequence[Example], Sequence[Example]], loop.Task]
WorkOf = Callable[[Description], training_peak.Work]  # of one step


def run(options: TrainOptions, recipe: loop.Recipe, make: MakeTask, work_of: WorkOf) -> None:
    """Train a task and write its file. Raises OutsizeError."""
    with session(options) as (options, device):
        pack = fetch.find(options.model) or fetch.pack(options.model, quiet=options.quiet)
        training_peak.check((pack,), work_of(pack.description), options)
        _run(options, recipe, make, pack, device)


@contextmanager
def session(options: TrainOptions, *others: Path) -> Iterator[tuple[TrainOptions, torch.device]]:
    """The device to train on, joined with the other processes if there are some, of which only the first one
    speaks. `others`: checkpoints of earlier parts. Raises OptionError, also where what will be trained could
    not be written, or another process trains it."""
    check_place(options.output)
    checkpoints.check(options.resume, options.checkpoint, *others)
    device = join(options.device)
    try:
        with alone(options.output):
            yield replace(options, quiet=options.quiet or processes()[0] > 0), device
    finally:
        leave()


def check_place(output: Path) -> None:
    """Before hours are spent on it."""
    if output.is_dir():
        raise OptionError(f"{output} is a folder; name a file in it")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise OptionError(
            f"{output.parent} is no folder that can be written, as {output.name} in it is to be; make it, or "
            "name another output"
        )


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """One training at a time into a file: the first of its processes holds a lock beside it."""
    if processes()[0] > 0:
        yield
        return
    path = output.with_name(f".{output.name}.lock")
    said = f"another process trains {output} now; wait for it, or name another output"
    with held(path, said):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def held(path: Path, said: str) -> Iterator[None]:
    """Hold a lock file; raise OptionError, which is `said`, where another process does."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, timeout=0))
        except filelock.Timeout:
            raise OptionError(said) from None
        yield


def _run(
    options: TrainOptions, recipe: loop.Recipe, make: MakeTask, pack: Pack, device: torch.device
) -> None:
    model = opened(pack, options, device)
    found = prepare(options, recipe.length, pack, model)
    count = min(HELD_OUT, len(found) // HELD_OUT_SHARE)
    task = make(model, found[count:], found[:count])
    training = train(task, options, pack.source.sha256, fingerprint(found))
    training.write(options.output)
    done(options)
    if not options.quiet:
        say(
            f"wrote {options.output} ({options.output.stat().st_size / 1e6:.1f} MB): {training.summary()} on "
            f"{count} held-out answers; use it with {task.use}{options.output}"
        )


def opened(pack: Pack, options: TrainOptions, device: torch.device) -> TrainableModel:
    """A pack's numbers, in what the device multiplies fastest (fp32 where they are such). Raises
    UnsupportedError."""
    check_usual(pack)
    with bars(options.quiet) as progress:
        return TrainableModel(pack, device, number_type(pack, device), progress)


def train(task: loop.Task, options: TrainOptions, base: str, data: str) -> loop.Training:
    """Train to the recipe's end, from the beginning or on from the checkpoint. `base`, `data`: hashes of what
    the result is for, and of what it learns from."""
    about, recipe = (base, data), task.recipe
    training = (
        loop.resume(task, options.checkpoint, *about)
        if options.resume
        else loop.start(task, *about)
    )
    with steps(options.quiet) as draw:

        def report(now: loop.Training) -> None:
            draw(f"loss {now.loss:.3f}, {now.summary()}", now.step, recipe.steps)

        loop.train(training, options.checkpoint, options.every, report)
    return training


def done(options: TrainOptions) -> None:
    """What was trained is kept elsewhere: the checkpoint goes."""
    if processes()[0] == 0:
        options.checkpoint.unlink(missing_ok=True)
