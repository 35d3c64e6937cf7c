"""`outsize bench speculate`: what drafts are worth by category of prompt, against no drafting.

The model is opened twice, each in a process of its own: without drafts, and with them. Both have the same
budget, so that what drafts take holds weights in the other; or else each holds the same share of the weights.
Each prompt is answered by both, in turn, the order changing from prompt to prompt. Texts must be identical: a
category with one that is not has no figures.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from outsize.engine import load as loading
from outsize.errors import OptionError
from outsize.options import LoadOptions
from outsize.plan import decide, probe
from outsize.plan.warmup import runtime_bytes
from outsize.progress import steps
from outsize.system import memory as budget
from outsize.text import prompt_file

LEAST_TOKENS = 8  # of an answer whose speed is compared
STEP, NEAR = 200_000, 0.01  # bytes to which a budget is planned; how near a share may be
CHARACTERS_A_TOKEN = 6  # at most: longer prompts are cut to what the context holds
Row = dict[str, Any]  # of results, as JSON has them


@dataclass(frozen=True, slots=True)
class SpeculateOptions:
    """What to measure, and on what."""

    prompts: Path
    draft: str = "auto"
    new_tokens: int = 128
    per_category: int = 0  # 0: all
    memory: str = "auto"
    held: float = 1.0  # share of the weights in memory, where `memory` is auto
    each: bool = False  # with drafts, too: their own memory comes on top; else both have one budget
    context: int = 2048
    threads: int | None = None
    quiet: bool = False

    @property
    def by_share(self) -> bool:
        """Is the budget the one in which a share of the weights is held?"""
        return self.memory == "auto" and self.held < 1

    def check(self) -> None:
        """Raises OptionError for what would be ignored."""
        if not 0 < self.held <= 1:
            raise OptionError(f"held is {self.held}; a share above 0 and up to 1 is expected")
        if self.held < 1 and not self.by_share:
            raise OptionError(
                f"held {self.held} and memory {self.memory} are two budgets; give only one of them"
            )
        if self.each and not self.by_share:
            raise OptionError("each needs a share of the weights; give --held below 1 with it")


class Answer(NamedTuple):
    """What is told of a reply."""

    text: str
    new_tokens: int
    tokens_per_s: float
    tokens_per_step: float
    accepted: int
    drafted: int


@dataclass(slots=True)
class Pairs:
    """A category's answers: without drafts, with them."""

    pairs: list[tuple[Answer, Answer]] = field(default_factory=list)

    def row(self, category: str) -> Row:
        about = {"category": category, "prompts": len(self.pairs)}
        same = all(a.text == b.text for a, b in self.pairs)
        timed = [(a, b) for a, b in self.pairs if a.new_tokens >= LEAST_TOKENS]
        if not same or not timed:
            return about | {"void": True}
        ratios = [b.tokens_per_s / a.tokens_per_s for a, b in timed]
        return about | {
            "void": False, "tokens_per_step": statistics.mean(b.tokens_per_step for _, b in timed),
            "plain_tokens_per_s": statistics.median(a.tokens_per_s for a, _ in timed),
            "tokens_per_s": statistics.median(b.tokens_per_s for _, b in timed),
            "ratio": statistics.mean(ratios), "least_ratio": min(ratios),
            "accepted": sum(b.accepted for _, b in timed),
            "drafted": sum(b.drafted for _, b in timed),
        }  # fmt: skip


def read(path: Path, per_category: int) -> list[tuple[str, str]]:
    """(category, prompt) of each line. Raises OptionError with the line's number."""
    out: list[tuple[str, str]] = []
    counts: dict[str, int] = {}
    for line in prompt_file.read([path], OptionError):
        counts[line.category] = counts.get(line.category, 0) + 1
        if not per_category or counts[line.category] <= per_category:
            out.append((line.category, line.prompt))
    return out


class Answerer:
    """A model in a process of its own, so that plans meet what a run meets; close it."""

    def __init__(self, model: str, options: SpeculateOptions) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, model, options), daemon=True)
        self._process.start()
        theirs.close()
        self.about: Row = self._pipe.recv()

    def answer(self, text: str) -> Answer:
        self._pipe.send(text)
        return Answer(*self._pipe.recv())

    def close(self) -> int:
        """Bytes of weights that were given up meanwhile, so as to keep the budget."""
        self._pipe.send("")
        given_up = int(self._pipe.recv())
        self._process.join()
        return given_up


def _serve(pipe: Connection, model: str, options: SpeculateOptions) -> None:
    """The other process: texts in, answers out, until an empty one."""
    probe.set_threads(options.threads)
    with loading.load(
        model,
        memory=options.memory,
        context=options.context,
        draft=options.draft,
        prefix_cache="off",
        quiet=True,
    ) as m:
        held = round(1 - m.placement.streamed / max(1, m.pack.size), 4)
        pipe.send(
            {"model": m.name, "held_share": held, "context": m.context, "drafts": m.drafting.spec.kind,
             "mtp": m.drafting.mtp is not None, "memory": m.placement.budget,
             "weights_bytes": m.pack.size}
        )  # fmt: skip
        while text := pipe.recv():
            (reply,) = m.generate(text, max_tokens=options.new_tokens)
            pipe.send([getattr(reply, name) for name in Answer._fields])
        pipe.send(m.given_up)


def measure(plain: Answerer, drafted: Answerer, options: SpeculateOptions) -> Iterator[Row]:
    """A row for each category, then their mean."""
    found: dict[str, Pairs] = {}
    prompts = read(options.prompts, options.per_category)
    context = drafted.about["context"]
    with steps(options.quiet) as draw:
        for number, (category, prompt) in enumerate(prompts):
            text = prompt[: CHARACTERS_A_TOKEN * (context - options.new_tokens) // 2]
            turn = (plain, drafted) if number % 2 else (drafted, plain)
            answers = {id(model): model.answer(text) for model in turn}
            pair = answers[id(plain)], answers[id(drafted)]
            found.setdefault(category, Pairs()).pairs.append(pair)
            draw(f"speculating, {category}", number + 1, len(prompts))
    rows = [pairs.row(category) for category, pairs in found.items()]
    yield from rows
    yield _mean([row for row in rows if not row["void"]])


def _mean(rows: Sequence[Row]) -> Row:
    if not rows:
        return {"category": "mean", "void": True}
    keys = ("tokens_per_step", "plain_tokens_per_s", "tokens_per_s", "ratio")
    means = {key: statistics.mean(row[key] for row in rows) for key in keys}
    least = min(row["least_ratio"] for row in rows)
    return {"category": "mean", "void": False, **means, "least_ratio": least}


def memory_for(model: str, options: SpeculateOptions) -> str:
    """The least budget in which the wanted share of the weights is held: plans tell, tried by halves."""
    if not options.by_share:
        return options.memory
    load_options = LoadOptions(context=options.context, draft=options.draft, quiet=True)
    runtime = runtime_bytes(decide.compiled(load_options))
    outline, placed = decide.foresee(model, load_options, budget.parse("auto"), runtime)
    low, high = placed.least, placed.planned
    tokenizer = placed.fixed["tokenizer"]
    while high - low > STEP:
        middle = (low + high) // 2
        made = decide.decide(outline, load_options, middle, runtime, tokenizer)
        enough = made.streamed <= (1 - options.held) * outline.size
        low, high = (low, middle) if enough else (middle, high)
    return str(high)


def open_at(model: str, options: SpeculateOptions) -> tuple[str, Answerer]:
    """A budget, and the model in it. What a process takes besides the weights shows only once it runs: a
    budget for a share is corrected by that, and the model opened again."""
    memory = memory_for(model, options)
    for last in (False, False, True):
        opened = Answerer(model, replace(options, memory=memory))
        over = opened.about["held_share"] - options.held
        if last or not options.by_share or abs(over) < NEAR:
            break
        opened.close()
        memory = str(int(memory) - int(over * opened.about["weights_bytes"]))
    return memory, opened


def show(model: str, options: SpeculateOptions, as_json: bool) -> None:
    """Measure and print: a table, then one JSON object a line; with --json those alone."""
    options.check()
    memory, plain = open_at(model, replace(options, draft="none"))
    _, drafted = open_at(model, options if options.each else replace(options, memory=memory))
    rows = list(measure(plain, drafted, options))
    about = drafted.about | {
        "draft": options.draft, "plain_held_share": plain.about["held_share"],
        "plain_memory": plain.about["memory"],
        "threads": options.threads, "new_tokens": options.new_tokens,
        "plain_given_up_bytes": plain.close(), "given_up_bytes": drafted.close(),
    }  # fmt: skip
    if not as_json:
        print("\n".join(_table(about, rows)))
    for row in rows:
        print(json.dumps(about | row))


def _table(about: Row, rows: Sequence[Row]) -> Iterator[str]:
    shares = f"{about['plain_held_share']:.0%} without, {about['held_share']:.0%} with"
    yield f"{about['model']}, draft {about['draft']}; of the weights in memory: {shares}"
    if lost := max(about["plain_given_up_bytes"], about["given_up_bytes"]):
        yield f"of those, up to {lost / 1e6:.0f} MB were given up on the way to keep the budget"
    yield f"{'category':>16}  tokens a step  tokens/s (plain)  ratio  least"
    yield from map(_line, rows)


def _line(row: Row) -> str:
    if row["void"]:
        return f"{row['category']:>16}  void: texts differ, or none is long enough"
    return (
        f"{row['category']:>16}  {row['tokens_per_step']:13.2f}  {row['tokens_per_s']:7.1f} "
        f"({row['plain_tokens_per_s']:6.1f})  {row['ratio']:4.2f}x  {row['least_ratio']:4.2f}x"
    )
