"""A plan as text: two lines at the start of a run, or the whole table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from outsize.pack.outline import Outline
from outsize.plan.cost import UNHIDDEN, Cost
from outsize.plan.fixed import routed
from outsize.plan.machine import Machine
from outsize.plan.make import Plan
from outsize.plan.placement import BY_ROUTER, BY_TOKEN, Placement

BAR = 40
SHORT = 20  # a bar beside other figures
HOUR = 3600.0


def mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def mb_or_kb(size: float) -> str:
    return mb(size) if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def short(o: Outline, p: Placement, cost: Cost | None) -> list[str]:
    """The first lines of a run."""
    out = [
        f"[plan: {mb(p.planned)} of {mb(p.budget)}: {', '.join(_fixed(p))}, weights {mb(p.held)}; "
        f"context {p.context:,}]"
    ]
    said = []
    if p.streamed:
        share = 1 - p.streamed / o.size
        said.append(
            f"{mb(p.streamed)} a pass from disk ({share:.0%} of the weights stay in memory)"
        )
    if missing := sum(size for _, tier, size in p.groups if tier in (BY_ROUTER, BY_TOKEN)):
        all_of = sum(t.size for t in routed(o))
        said.append(f"slots for {1 - missing / all_of:.0%} of the {_what(o)}")
    if o.neurons is not None:
        said.append(o.neurons.cost)
    if said or cost is not None:
        out.append(f"[plan: {', '.join(said) or 'all weights in memory'}{_speed(cost)}]")
    return out


def _what(o: Outline) -> str:
    if o.description.has_table or o.description.token_width:
        return "table's rows"
    return "experts" if o.neurons is None else "neurons"


def _speed(cost: Cost | None) -> str:
    if cost is None:
        return ""
    return (
        f"; about {cost.tokens_per_s:.3g} tokens/s, first token of {cost.prompt_tokens} after "
        f"{cost.first_token_s:.3g} s"
    )


def _fixed(p: Placement) -> Iterator[str]:
    return (f"{name} {mb(size)}" for name, size in p.fixed.items())


def long(plan: Plan) -> Iterator[str]:
    """All that `outsize plan` shows, by lines."""
    o, p = plan.outline, plan.placement
    state = "packed" if o.is_packed else "not packed yet"
    yield f"{o.name} ({mb(o.size)} of weights, {state}) in {mb(p.budget)}, context {p.context:,}"
    if o.quality is not None:
        yield str(o.quality)
    yield ""
    yield f"{'what':<26}{'where':<18}{'MB':>10}"
    for name, size in p.fixed.items():
        yield f"{name:<26}{'memory':<18}{size / 1e6:>10,.1f}"
    for group, tier, size in p.groups:
        yield f"{_named(o, group):<26}{tier:<18}{size / 1e6:>10,.1f}"
    yield f"{'in memory':<26}{'':<18}{p.planned / 1e6:>10,.1f}"
    yield f"{'least that works':<26}{'':<18}{p.least / 1e6:>10,.1f}"
    yield ""
    yield from _arithmetic(p, plan.cost, plan.machine, _what(o))
    yield ""
    yield from _curve(p, plan.curve)
    yield from _family(plan)
    yield from (f"note: {note}" for note in p.notes)


def _named(o: Outline, group: str) -> str:
    table = o.table(group)
    if table.kind == "tokens":  # of which a record may have many
        return f"{group} ({table.num_rows:,} rows)"
    units = {"layers": "layers", "experts": "experts", "neurons": "bundles"}
    return f"{group} ({len(table.keys)} {units.get(table.kind, 'blocks')})"


def _arithmetic(p: Placement, c: Cost, here: Machine, what: str) -> Iterator[str]:
    rate = here.disk_bytes_per_s
    yield (
        f"a token: max, and {UNHIDDEN:.0%} of min, of (read {mb(p.streamed)} / {rate / 1e9:.2f} GB/s = "
        f"{c.read_s * 1e3:,.1f} ms, "
        f"compute {c.compute_s * 1e3:,.1f} ms) = {c.tokens_per_s:.3g} tokens/s"
    )
    if c.hit_rates is not None:
        low, high = c.range_s
        yield (
            f"{what}: {mb_or_kb(c.expert_bytes)}{_reads(c)} a token if none were there; "
            f"{c.hit_rates[0]:.0%} to {c.hit_rates[1]:.0%} expected to be ({c.hit_rates_from}): "
            f"{1 / high:.3g} to {1 / low:.3g} tokens/s"
        )
    yield (
        f"first token of {c.prompt_tokens}: embedding rows {c.prompt_rows_s:.2f} s + max(read "
        f"{c.prompt_read_s:.2f} s, compute {c.prompt_compute_s:.2f} s) = {c.first_token_s:.2f} s"
    )
    busy = f" ({here.busy}: maybe too low)" if here.busy else ""
    yield f"machine measured {_age(here.age_s)} ago{busy}; `outsize doctor` measures it again"


def _reads(c: Cost) -> str:
    return "" if c.neuron_reads is None else f" in {c.neuron_reads.runs:,.0f} reads"


def _family(plan: Plan) -> Iterator[str]:
    """Of nested experts: what each width reads, how fast it would be, and what it costs."""
    if not plan.family:
        return
    yield ""
    head = "MB a token", "from disk", "perplexity", "KL", "tokens/s"
    yield f"{'--width':<9}" + "".join(f"{name:>12}" for name in head)
    top = max(one.tokens_per_s for one in plan.family)
    for one in plan.family:
        bar = "#" * max(1, round(SHORT * one.tokens_per_s / top))
        yield (
            f"{width_name(one.share):<9}{one.used_bytes / 1e6:>12,.1f}{one.read_bytes / 1e6:>12,.1f}"
            f"{one.perplexity:>12,.2f}{one.kl:>12.3f}{one.tokens_per_s:>12.3g} {bar}"
        )
    yield (
        f"--width auto is {width_name(plan.auto)} here: the widest that loses little and whose pieces memory "
        "holds, or full"
    )


def width_name(share: float) -> str:
    return "full" if share == 1 else f"{share:.2f}"


def _age(seconds: float) -> str:
    if seconds < HOUR:
        return f"{seconds / 60:.0f} minutes"
    return (
        f"{seconds / HOUR:.0f} hours" if seconds < 48 * HOUR else f"{seconds / 24 / HOUR:.0f} days"
    )


def _curve(p: Placement, curve: Sequence[tuple[int, float]]) -> Iterator[str]:
    yield "tokens/s against memory"
    top = max(v for _, v in curve)
    for memory, speed in curve[:: max(1, len(curve) // 8)]:
        bar = "#" * max(1, round(BAR * speed / top))
        yield f"{memory / 1e6:>9,.0f} MB {speed:>8.3g} {bar}"
    more = next((v for m, v in curve if m >= p.budget + 1e9), top)
    now = max((v for m, v in curve if m <= p.budget), default=curve[0][1])
    yield f"one more GB: {now:.3g} -> {max(now, more):.3g} tokens/s"
