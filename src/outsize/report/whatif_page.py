"""A model now and as it would be, as one self-contained HTML page: a picture and a row for each
operation. No script, no font, nothing fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape

from outsize.plan.compare import Comparison
from outsize.plan.operations import Operation
from outsize.report import svg
from outsize.report.whatif_text import NOTE, summary, total

COLOURS = ("#9aa5b8", "#1f6feb")  # now, then
TALL, BAR, GAP = 3 * 34 + 10, 12, 34
Measure = Callable[[Operation], float]
MEASURES: dict[str, tuple[Measure, str]] = {
    "bytes": (lambda op: op.bytes / 1e6, "MB"),
    "FLOP": (lambda op: op.flop / 1e6, "MFLOP"),
    "time": (lambda op: op.s * 1e3, "ms"),
}


def page(c: Comparison) -> str:
    """The page."""
    now, then = (1 / side.token_s for side in (c.now, c.then))
    parts = [
        f"<p><b>{now:,.1f} tokens/s now, about {then:,.1f} then.</b> Grey: now; blue: with "
        f"{escape(c.wish)}. Bars are to one scale on the whole page.</p>",
        svg.table(["", "now", "then"], summary(c)),
        "<h2>One token, operation by operation</h2>",
    ]
    most = {
        name: max(measure(op) for _, *ops in c.pairs() for op in ops if op is not None) or 1.0
        for name, (measure, _) in MEASURES.items()
    }
    for name, *ops in c.pairs():
        parts += [f"<h3>{escape(name)}</h3>", svg.drawing(_bars(ops, most), TALL)]
    rows = [_row(name, now_op, then_op) for name, now_op, then_op in c.pairs()]
    rows.append(_row("all", total(c.now), total(c.then)))
    head = ["operation", "MB", "then", "MFLOP", "then", "ms", "then"]
    parts += ["<h2>In numbers</h2>", svg.table(head, rows), f"<p>{escape(NOTE.capitalize())}.</p>"]
    return svg.page(f"outsize plan: {c.model}, what if {c.wish}", parts)


def _bars(ops: list[Operation | None], most: dict[str, float]) -> Iterator[str]:
    """Bytes, operations and time, now and then."""
    room = svg.WIDTH - svg.LEFT - svg.RIGHT
    for line, (name, (measure, unit)) in enumerate(MEASURES.items()):
        top = 4 + GAP * line
        yield svg.text(svg.LEFT - 8, top + BAR + 4, name, "end")
        for i, op in enumerate(ops):
            value = 0.0 if op is None else measure(op)
            said = "none" if op is None else f"{value:,.3g} {unit}"
            width, y = room * value / most[name], top + i * (BAR + 1)
            yield svg.box((svg.LEFT, y, width, BAR), COLOURS[i], said)
            yield svg.text(svg.LEFT + width + 6, y + BAR - 2, said, "start")


def _row(name: str, now: Operation | None, then: Operation | None) -> list[str]:
    cells = [
        "-" if op is None else f"{measure(op):,.3f}"
        for measure, _ in MEASURES.values()
        for op in (now, then)
    ]
    return [name, *cells]
