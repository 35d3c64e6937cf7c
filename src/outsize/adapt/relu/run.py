"""`outsize adapt relu`: from a pack with SwiGLU to one with ReLU, whose neurons can be paged: trained, then
written as a pack of its own. What is trained is kept in a checkpoint, and gone on from; a line of figures is
kept for each time that it was judged."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from outsize.adapt import checkpoints, loop
from outsize.adapt.processes import join, leave, processes
from outsize.adapt.relu.task import NAMES, ReluRecipe, ReluTask
from outsize.adapt.run import alone
from outsize.adapt.sparsity.words import Words, words
from outsize.adapt.trainable import TrainableModel, matmul_type
from outsize.arguments import whole
from outsize.encoding.find import encoding
from outsize.errors import BudgetError, OptionError, UnsupportedError
from outsize.home import home
from outsize.kernels.plain import PLAIN
from outsize.model_config import Description
from outsize.pack import derive, fetch
from outsize.pack.format import Pack
from outsize.pack.source import derived
from outsize.pack.tables import TableHeader
from outsize.pack.tensors import Made
from outsize.plan.warmup import runtime_bytes
from outsize.progress import bars, steps
from outsize.storage.records import Records
from outsize.system import memory

METHOD = 1  # raise it where the same options would give other numbers
LEARNING = 16  # bytes of a number that learns: itself, its gradient, what AdamW keeps
ACTIVATIONS = 48  # bytes of a token and a neuron, of all layers
FOR = "relu"  # what stands for an encoding in the pack's name


@dataclass(frozen=True, slots=True)
class ReluOptions:
    """What to train on, and how much memory that may take."""

    model: str
    data: tuple[Path, ...]
    tokens: int = 1 << 20  # that are read of the data
    every: int = 50  # steps between checkpoints
    resume: bool = False
    device: str = "auto"
    encoding: str = "auto"
    memory: str | int = "auto"
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "every"):
            whole(name, getattr(self, name), 1, 1 << 30)


@dataclass(frozen=True, slots=True)
class Relufied:
    """The pack, how it was judged at the end, and where each judgement is kept."""

    pack: Pack
    figures: Mapping[str, float]
    history: Path


def run(options: ReluOptions, recipe: ReluRecipe) -> Relufied:
    """Raises OptionError, UnsupportedError, BudgetError, DataError, AdapterError, PackError,
    DiskFullError."""
    device = join(options.device)
    try:
        return _run(replace(options, quiet=options.quiet or processes()[0] > 0), recipe, device)
    finally:
        leave()


def _run(options: ReluOptions, recipe: ReluRecipe, device: torch.device) -> Relufied:
    base = fetch.find(options.model, options.encoding) or fetch.pack(
        options.model, encoding=options.encoding, quiet=options.quiet
    )
    recipe = fitted(recipe, base.description)
    _check(base, recipe, memory.parse(options.memory))
    found = words(base, options.data, options.tokens, recipe.length)
    work = home() / "adapt" / f"{base.path.name}.{FOR}"
    checkpoint = work.with_suffix(f".{FOR}.checkpoint")
    history = work.with_suffix(f".{FOR}.jsonl")
    work.parent.mkdir(parents=True, exist_ok=True)
    with alone(checkpoint):
        checkpoints.check(options.resume, checkpoint)
        with bars(options.quiet) as progress:
            model = TrainableModel(base, device, matmul_type(device), progress)
        task = ReluTask(recipe, model, found.ids_BT, found.held_out_BT)
        training = _trained(task, base, found, options, (checkpoint, history))
        pack = base
        if processes()[0] == 0:
            pack = _write(base, task, found, options)
            checkpoint.unlink(missing_ok=True)
    return Relufied(pack, training.figures, history)


def _trained(
    task: ReluTask, base: Pack, found: Words, options: ReluOptions, paths: tuple[Path, Path]
) -> loop.Training:
    checkpoint, history = paths
    about = base.source.sha256, found.fingerprint
    training = loop.resume(task, checkpoint, *about) if options.resume else loop.start(task, *about)
    if not options.resume and processes()[0] == 0:
        history.unlink(missing_ok=True)
    begin, first, recipe = time.process_time(), training.step, task.recipe
    with steps(options.quiet) as draw:

        def report(now: loop.Training) -> None:
            draw(f"loss {now.loss:.3f}, {now.summary()}", now.step, recipe.steps)
            if (now.step % options.every and now.step != recipe.steps) or processes()[0] > 0:
                return
            row = {
                "step": now.step, "tokens": now.step * recipe.batch * recipe.length, "loss": now.loss,
                "processor_s": time.process_time() - begin, "steps_since": now.step - first,
                **now.figures,
            }  # fmt: skip
            with history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

        loop.train(training, checkpoint, options.every, report)
    return training


def fitted(recipe: ReluRecipe, d: Description) -> ReluRecipe:
    """No sequence is longer than the model's context, nor counted as if it were."""
    return replace(recipe, length=min(recipe.length, d.context))


def _check(base: Pack, recipe: ReluRecipe, budget: int) -> None:
    """Refuse what is known to fail."""
    d = base.description
    if not d.is_usual:
        raise UnsupportedError(
            f"{base.path.name} is a {d.family} model; relu is for dense models with gated feed-forwards"
        )
    if d.ffn_width % recipe.bundle:
        raise OptionError(
            f"bundle is {recipe.bundle}, which does not divide {base.path.name}'s {d.ffn_width:,} neurons"
        )
    if d.activation != "silu":
        raise OptionError(
            f"{base.path.name} has {d.activation} feed-forwards; relu takes the place of silu. "
            "`outsize adapt sparsity` measures which neurons fire as it is"
        )
    numbers = 3 * d.num_layers * d.ffn_width * d.width
    tokens = recipe.batch * recipe.length
    need = runtime_bytes(PLAIN) + 3 * base.size + LEARNING * numbers
    need += ACTIVATIONS * tokens * d.num_layers * d.ffn_width + 12 * tokens * d.vocab_size
    if need > budget:
        raise BudgetError(
            f"training {base.path.name} takes about {need / 1e6:,.0f} MB of memory, and "
            f"{budget / 1e6:,.0f} MB may be used; give a larger --memory, or a smaller --batch or --length"
        )


def _write(base: Pack, task: ReluTask, found: Words, options: ReluOptions) -> Pack:
    """A pack with what was trained, in eight bits (of an fp32 pack in fp32)."""
    new = replace(base, description=replace(base.description, activation=task.recipe.activation))
    said = {"made": FOR, "method": METHOD, "data": found.fingerprint, **asdict(task.recipe)}
    source = derived(base.source, FOR, said)
    is_fp32 = base.table_of("attn-0").tensors["o"][0].encoding == "fp32"
    kind = "fp32" if is_fp32 else "int8"
    with Records(base) as records, bars(options.quiet) as progress:
        made = {
            (layer, name): (_made(kind, task.parameters[f"{layer}.{name}"].detach()),)
            for layer in range(base.description.num_layers)
            for name in NAMES
        }
        tables = derive.tables_with(new, partial(_stored, records), made)
        return derive.derive(new, source, tables, None, home() / "packs", progress)


def _made(kind: str, w_NK: Tensor) -> Made:
    num_rows, width = w_NK.shape
    return Made(kind, num_rows, width, partial(encoding(kind).encode, w_NK.cpu()))


def _stored(
    records: Records, table: TableHeader, number: int
) -> dict[str, list[Mapping[str, Tensor]]]:
    read = records.read(table, number)
    return {name: [w.fields for w in weights] for name, weights in read.items()}


def summary(made: Relufied) -> str:
    """In words."""
    f = made.figures
    return (
        f"perplexity {f['perplexity_before']:,.2f} -> {f['perplexity']:,.2f} on held-out text, "
        f"{f['fires']:.0%} of neurons and {f['bundles_fire']:.0%} of bundles fire"
    )


def about(made: Relufied) -> dict[str, object]:
    """For --json."""
    return {"pack": str(made.pack.path), "history": str(made.history), **made.figures}
