"""A model as it is and as it would be, side by side: where it lies, what each operation of a token costs, how
fast it is. After Talaria (arXiv 2404.03085), which shows a change's effect before anybody trains it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from outsize.home import home
from outsize.kernels.backend import Backend
from outsize.log import say, silent
from outsize.options import LoadOptions
from outsize.pack.outline import Outline
from outsize.plan import compute_times, cost, decide, machine
from outsize.plan.cost import Cost
from outsize.plan.fixed import stored_bytes
from outsize.plan.machine import Compute, Machine
from outsize.plan.make import prompt_tokens
from outsize.plan.operations import LOWRANK, Operation, operations
from outsize.plan.place import tokenizer_bytes
from outsize.plan.placement import Placement
from outsize.plan.probe import set_threads
from outsize.plan.warmup import runtime_bytes
from outsize.plan.whatif import changed, parse
from outsize.system import memory
from outsize.weights.neuron_spec import OFF

TRIES = 2  # measurements of both in turn; the lower times count


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models."""

    outline: Outline
    placement: Placement
    cost: Cost
    operations: tuple[Operation, ...]

    @property
    def token_s(self) -> float:
        """Of one token: as a run is planned, and what an adapter adds."""
        return self.cost.token_s + sum(op.s for op in self.operations if op.name == LOWRANK)

    @property
    def kv_bytes(self) -> int:
        """Of one token of context."""
        return stored_bytes(self.outline)

    def to_json(self) -> dict[str, object]:
        return {
            "weights_bytes": self.outline.size,
            "least_bytes": self.placement.least,
            "streamed_bytes": self.placement.streamed,
            "kv_bytes_per_token": self.kv_bytes,
            "token_ms": round(self.token_s * 1e3, 4),
            "tokens_per_s": round(1 / self.token_s, 3),
            "read_ms": round(self.cost.read_s * 1e3, 4),
            "first_token_s": round(self.cost.first_token_s, 4),
            "operations": [op.to_json() for op in self.operations],
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model now, and then. `wish`: as it was typed."""

    model: str
    wish: str
    prompt: int
    now: Side
    then: Side

    def pairs(self) -> list[tuple[str, Operation | None, Operation | None]]:
        """Each operation's name, and what it costs now and then; None: there is none."""
        now, then = ({op.name: op for op in side.operations} for side in (self.now, self.then))
        names = dict.fromkeys([*then, *now])
        return [(name, now.get(name), then.get(name)) for name in names]

    def to_json(self) -> dict[str, object]:
        return {
            "model": self.model, "what_if": self.wish, "prompt_tokens": self.prompt,
            "budget_bytes": self.now.placement.budget, "now": self.now.to_json(), "then": self.then.to_json(),
        }  # fmt: skip


def compare(model: str, options: LoadOptions, text: str, prompt: int | None) -> Comparison:
    """Plan a model and what `text` would make of it. Raises OptionError, UnsupportedError, BudgetError and
    what finding a model raises."""
    wish = parse(text)
    options = replace(options, neurons=OFF)
    decide.check(options)
    set_threads(options.threads)
    native = decide.compiled(options)
    size, runtime = memory.parse(options.memory), runtime_bytes(native)
    o, placed = decide.foresee(model, options, size, runtime)
    other = changed(o, wish)
    there = decide.decide(
        other, replace(options, kv=other.kv), size, runtime, tokenizer_bytes(other)
    )
    here = machine.known(home(), silent if options.quiet else say)
    now, then = _measured(o, other, native)
    asked = Asked(here, native, prompt_tokens(prompt, min(placed.context, there.context)))
    first = _side(o, placed, now, asked)
    second = _side(other, there, then, asked, wish.rank)
    return Comparison(o.name, text, asked.prompt, first, second)


@dataclass(frozen=True, slots=True)
class Asked:
    """What both are planned for."""

    machine: Machine
    native: Backend
    prompt: int


def _side(
    o: Outline, placed: Placement, compute: Compute, asked: Asked, rank: int | None = None
) -> Side:
    predicted = cost.predict(o, asked.machine, placed, compute, asked.prompt)
    found = operations(o, compute, asked.native, asked.prompt, rank)
    return Side(o, placed, predicted, tuple(found))


def _measured(now: Outline, then: Outline, native: Backend) -> tuple[Compute, Compute]:
    """Computing times of both, in turn."""
    a, b = compute_times.measure(now, native), compute_times.measure(then, native)
    for _ in range(TRIES - 1):
        a = a.or_faster(compute_times.measure(now, native))
        b = b.or_faster(compute_times.measure(then, native))
    return a, b
