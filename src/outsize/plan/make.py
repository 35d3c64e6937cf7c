"""The plan of a run: its placement, its predicted speed, and the curve of speed against memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from outsize.arguments import whole
from outsize.caching.replay.trace import read
from outsize.home import home
from outsize.kernels.backend import Backend
from outsize.kernels.plain import PLAIN
from outsize.log import say, silent
from outsize.model.width import AUTO
from outsize.options import LoadOptions
from outsize.pack.outline import Outline
from outsize.plan import compute_times, cost, machine
from outsize.plan.compute_times import IN_TURN
from outsize.plan.cores import Watch
from outsize.plan.cost import Cost
from outsize.plan.decide import check, compiled, foresee
from outsize.plan.hit_rates import PRIOR, recorded
from outsize.plan.machine import Compute, Machine
from outsize.plan.nested import settled
from outsize.plan.nested_cost import Predicted, predicted_widths
from outsize.plan.place import least_bytes, place, tokenizer_bytes
from outsize.plan.placement import Placement
from outsize.plan.probe import set_threads
from outsize.plan.warmup import runtime_bytes
from outsize.system import memory as budget
from outsize.weights.spec import parse_experts

POINTS = 24
PROMPT = 512  # tokens, or as many as the context holds


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `outsize plan` shows."""

    outline: Outline
    placement: Placement
    cost: Cost
    machine: Machine
    curve: list[tuple[int, float]]  # (bytes of memory, tokens/s)
    family: tuple[Predicted, ...] = ()  # of nested experts: what each width would be
    auto: float = 1.0  # what width=auto is of them

    def to_json(self) -> dict[str, object]:
        return {
            "model": self.outline.name,
            "weights_bytes": self.outline.size,
            "quality": None if self.outline.quality is None else asdict(self.outline.quality),
            **self.placement.to_json(),
            **self.cost.to_json(),
            "machine_age_s": round(self.machine.age_s),
            "disk_bytes_per_s": round(self.machine.disk_bytes_per_s),
            "widths": [asdict(one) for one in self.family],
            "auto_width": self.auto,
            "curve": [{"memory_bytes": m, "tokens_per_s": round(v, 3)} for m, v in self.curve],
        }


def make(model: str, options: LoadOptions, prompt: int | None, trace: Path | None = None) -> Plan:
    """Plan a run from headers alone; experts by what a recorded `trace` tells of them, if there is one.
    Raises BudgetError, TraceError and what finding a model raises."""
    check(options)
    set_threads(options.threads)
    native = compiled(options)
    size, runtime = budget.parse(options.memory), runtime_bytes(native)
    outline, placed = foresee(model, options, size, runtime)
    folder = home()
    here = machine.known(folder, silent if options.quiet else say)
    here, compute = computing(outline, here, native)
    context, tokenizer = placed.context, tokenizer_bytes(outline)
    prompt = prompt_tokens(prompt, context)
    rates = PRIOR
    if trace is not None:
        eviction = parse_experts(options.experts or "").eviction
        rates = recorded(read(trace), outline.description, eviction)
    predicted = cost.predict(outline, here, placed, compute, prompt, rates)
    low = least_bytes(outline, runtime, tokenizer, context)
    high = int((sum(placed.fixed.values()) + outline.size) * 1.05)
    curve = []
    for at in (low + (high - low) * i // (POINTS - 1) for i in range(POINTS)):
        there = place(outline, at, runtime, tokenizer, context)
        curve.append((at, cost.predict(outline, here, there, compute, prompt, rates).tokens_per_s))
    family, auto = predicted_widths(outline, placed, predicted), settled(AUTO, outline, placed)
    return Plan(outline, placed, predicted, here, curve, family, auto)


def prompt_tokens(given: int | None, context: int) -> int:
    """Prompt tokens of the prediction. Raises OptionError."""
    if given is None:
        return min(PROMPT, context)
    whole("prompt_tokens", given, 1, context)
    return given


def computing(
    outline: Outline, here: Machine, native: Backend, room: int | None = None
) -> tuple[Machine, Compute]:
    """Computing times of this model: as kept, else measured now on random weights, and kept. `room`: bytes
    that these may have; None: enough, and measured in any case, since a processor's speed changes by a third
    within an hour where others share it."""
    folder = home()
    key = cost.key(outline) + ("" if native is not PLAIN else "-plain")
    if room is None or key not in here.models:
        with Watch() as watch:
            made = compute_times.measure(outline, native, IN_TURN if room is None else room)
        if watch.reason and key in here.models:  # beside others: nothing better is replaced
            made = here.models[key].or_faster(made)
        here = machine.with_model(here, key, made, folder)
    return here, here.models[key]


def cost_if_known(
    outline: Outline, placement: Placement, prompt: int = PROMPT, disk_rate: float | None = None
) -> Cost | None:
    """The prediction for a run's first lines. What it needs is measured, if it is not kept, only where
    weights will be read from disk. `disk_rate`: in bytes a second, in place of what is kept."""
    here = machine.kept(home())
    if here is None and not placement.streamed:
        return None
    here = here or machine.known(home(), say)
    if cost.key(outline) not in here.models and not placement.streamed:
        return None
    room = min(placement.held, IN_TURN)  # what weights will have
    here, compute = computing(outline, here, compiled(LoadOptions()), room)
    if disk_rate is not None:
        here = here.at_rate(disk_rate)
    return cost.predict(outline, here, placement, compute, min(prompt, placement.context))


def disk_rate() -> float | None:
    """Measured rate of the disk in bytes a second; None: never measured."""
    here = machine.kept(home())
    return None if here is None else here.disk_bytes_per_s
