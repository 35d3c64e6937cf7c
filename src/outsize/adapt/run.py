"""Runs a training task from the command line's options: data, device, checkpoint, file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from outsize.adapt import checkpoints, loop
from outsize.adapt.examples import Example, TrainOptions, fingerprint, prepare
from outsize.adapt.processes import join, leave, processes
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.errors import UnsupportedError
from outsize.log import say
from outsize.pack import fetch
from outsize.progress import bars, steps

HELD_OUT_SHARE, HELD_OUT = 50, 64  # one in so many, at most so many
# A task for a model, its examples to train on, and those held out.
MakeTask = Callable[[TrainableModel, Sequence[Example], Sequence[Example]], loop.Task]


def run(options: TrainOptions, recipe: loop.Recipe, make: MakeTask) -> None:
    """Train a task and write its file. Raises OutsizeError."""
    if options.resume:
        checkpoints.find(options.checkpoint)
    device = join(options.device)
    try:
        quiet = options.quiet or processes()[0] > 0
        _run(replace(options, quiet=quiet), recipe, make, device)
    finally:
        leave()


def _run(options: TrainOptions, recipe: loop.Recipe, make: MakeTask, device: torch.device) -> None:
    pack = fetch.find(options.model) or fetch.pack(options.model, quiet=options.quiet)
    if not pack.description.is_usual:
        raise UnsupportedError(
            f"{pack.path.name} is a {pack.description.family} model; training knows dense models without "
            "sinks, of RMSNorms and gated feed-forwards"
        )
    with bars(options.quiet) as progress:
        model = TrainableModel(pack, device, matmul_type(device), progress)
    found = prepare(options, recipe.length, pack, model)
    count = min(HELD_OUT, len(found) // HELD_OUT_SHARE)
    task = make(model, found[count:], found[:count])
    about = pack.source.sha256, fingerprint(found)
    training = (
        loop.resume(task, options.checkpoint, *about)
        if options.resume
        else loop.start(task, *about)
    )
    with steps(options.quiet) as draw:

        def report(now: loop.Training) -> None:
            draw(f"loss {now.loss:.3f}, {now.summary()}", now.step, recipe.steps)

        loop.train(training, options.checkpoint, options.every, report)
    training.write(options.output)
    if processes()[0] == 0:
        options.checkpoint.unlink(missing_ok=True)
    if not options.quiet:
        say(
            f"wrote {options.output} ({options.output.stat().st_size / 1e6:.1f} MB): {training.summary()} on "
            f"{count} held-out answers; use it with {task.use}{options.output}"
        )
