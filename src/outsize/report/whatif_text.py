"""A comparison of a model now and as it would be, as text."""

from __future__ import annotations

from collections.abc import Iterator

from outsize.plan.compare import Comparison, Side
from outsize.plan.operations import Operation

NOTE = (
    "predicted from headers: random weights of these shapes are timed, nothing is made, and what it does to "
    "answers is not said"
)


def lines(c: Comparison) -> Iterator[str]:
    """All that `outsize plan --what-if` shows."""
    yield f"{c.model}: now, and with {c.wish}"
    yield ""
    yield f"{'one token':<28}{'MB':>9}{'then':>9}{'MFLOP':>10}{'then':>10}{'ms':>9}{'then':>9}"
    for name, now, then in c.pairs():
        yield f"{name:<28}" + _cells(now, then)
    yield f"{'all':<28}" + _cells(total(c.now), total(c.then))
    if c.now.placement.streamed or c.then.placement.streamed:
        yield f"{'read from disk':<28}" + _cells(_reads(c.now), _reads(c.then))
    yield ""
    yield f"{'':<28}{'now':>12}{'then':>12}"
    for name, now_said, then_said in summary(c):
        yield f"{name:<28}{now_said:>12}{then_said:>12}"
    yield f"note: {NOTE}"


def total(side: Side) -> Operation:
    """Of all operations."""
    ops = side.operations
    return Operation(
        "all", sum(op.bytes for op in ops), sum(op.flop for op in ops), sum(op.s for op in ops)
    )


def summary(c: Comparison) -> list[tuple[str, str, str]]:
    """Name, and what it is now and then."""
    sides = (c.now, c.then)

    def row(name: str, values: Iterator[str]) -> tuple[str, str, str]:
        now, then = values
        return name, now, then

    return [
        row("weights, MB", (f"{s.outline.size / 1e6:,.1f}" for s in sides)),
        row("least memory, MB", (f"{s.placement.least / 1e6:,.0f}" for s in sides)),
        row("a token of context, bytes", (f"{s.kv_bytes:,}" for s in sides)),
        row(f"first token of {c.prompt}, s", (f"{s.cost.first_token_s:.3f}" for s in sides)),
        row("tokens/s", (f"{1 / s.token_s:,.1f}" for s in sides)),
    ]


def _reads(side: Side) -> Operation:
    return Operation("read", side.placement.streamed, 0, side.cost.read_s)


def _cells(now: Operation | None, then: Operation | None) -> str:
    def cell(op: Operation | None, kind: str) -> str:
        if op is None:
            return "-"
        value = {"MB": op.bytes / 1e6, "MFLOP": op.flop / 1e6, "ms": op.s * 1e3}[kind]
        return f"{value:,.3f}" if kind == "ms" else f"{value:,.2f}"

    pairs = ((kind, wide) for kind, wide in (("MB", 9), ("MFLOP", 10), ("ms", 9)))
    return "".join(f"{cell(op, kind):>{wide}}" for kind, wide in pairs for op in (now, then))
