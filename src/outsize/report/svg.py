"""Plots as text: inline SVG for pages that fetch nothing. Lines, stacked bars, heat maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 760, 320, 64, 150, 44, 24
COLOURS = (
    "#1f6feb", "#d1481f", "#2a9d5c", "#8250df", "#b58900", "#0aa2c0", "#c2185b", "#6b7280",
    "#7c4a03", "#3f51b5",
)  # fmt: skip
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:860px;margin:2em auto;padding:0 1em;color:#1c2430;
background:#fff} h1{font-size:1.3em} h2{font-size:1.05em;margin-top:2em}
table{border-collapse:collapse;font-size:13px} td,th{padding:.15em .8em .15em 0;text-align:right;
font-variant-numeric:tabular-nums} td:first-child,th:first-child{text-align:left}
svg{max-width:100%;height:auto} .grid{stroke:#e3e7ee} text{fill:#4a5568;font-size:12px}
@media(prefers-color-scheme:dark){body{background:#11161d;color:#dde3ec} text{fill:#aab4c3}
.grid{stroke:#263040}}
"""
Points = Sequence[tuple[float, float]]


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
    return f"{head}<style>{STYLE}</style><h1>{escape(title)}</h1>{''.join(parts)}</html>\n"


def lines(series: Mapping[str, Points], x_name: str, y_name: str, labels: Sequence[str]) -> str:
    """Curves over evenly spaced places 0, 1, ... that are labelled."""
    top = max((y for points in series.values() for _, y in points), default=1.0) * 1.06 or 1.0
    last = max(1, len(labels) - 1)

    def x(place: float) -> float:
        return LEFT + place / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP)

    out = _frame(y_name, x_name, top, y)
    out += [_text(x(i), HEIGHT - BOTTOM + 18, label, "middle") for i, label in enumerate(labels)]
    for number, (name, points) in enumerate(series.items()):
        colour, dash = COLOURS[number % len(COLOURS)], "5 4" if name == "belady" else "none"
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" '
                   f'stroke-dasharray="{dash}" points="{path}"/>')  # fmt: skip
        out += [_dot(x(a), y(b), colour, f"{name}: {b:.4g}") for a, b in points]
    return _svg(out + _legend(list(series)), HEIGHT)


def stacks(bars: Mapping[str, Mapping[str, float]], y_name: str) -> str:
    """One bar a name, its parts on top of each other."""
    kinds = list(dict.fromkeys(kind for parts in bars.values() for kind in parts))
    top = max((sum(parts.values()) for parts in bars.values()), default=1.0) * 1.06 or 1.0
    step = (WIDTH - LEFT - RIGHT) / max(1, len(bars))

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP)

    out = _frame(y_name, "", top, y)
    for place, (name, parts) in enumerate(bars.items()):
        base, left = 0.0, LEFT + (place + 0.15) * step
        for kind in kinds:
            value = parts.get(kind, 0.0)
            colour = COLOURS[kinds.index(kind) % len(COLOURS)]
            out.append(f'<rect x="{left:.1f}" y="{y(base + value):.1f}" width="{step * 0.7:.1f}" '
                       f'height="{y(base) - y(base + value):.1f}" fill="{colour}"><title>'
                       f"{escape(f'{name}: {kind} {value:,.4g}')}</title></rect>")  # fmt: skip
            base += value
        shift = 18 + 13 * (place % 2)
        out.append(_text(left + step * 0.35, HEIGHT - BOTTOM + shift, name, "middle"))
    return _svg(out + _legend(kinds), HEIGHT)


def heat(values: Sequence[Sequence[float]], x_name: str, y_name: str) -> str:
    """Rows of cells, the fuller the darker."""
    columns = max(len(row) for row in values)
    cell = (WIDTH - LEFT - 16) / columns
    tall = max(4.0, min(cell, 480 / len(values)))
    top = max(max(row) for row in values) or 1.0
    out = [_text(LEFT, 14, f"{y_name} down, {x_name} across", "start")]
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            if value:
                out.append(f'<rect x="{LEFT + c * cell:.1f}" y="{TOP + r * tall:.1f}" '
                           f'width="{cell:.1f}" height="{tall:.1f}" fill="#1f6feb" '
                           f'fill-opacity="{(value / top) ** 0.5:.2f}"/>')  # fmt: skip
    return _svg(out, int(TOP + len(values) * tall + 8))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}' for c in row)}" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(c)}' for c in head)}{body}</table>"


def ticks(top: float) -> list[float]:
    """A few round numbers from 0 to about `top`."""
    raw = top / 5
    power = 10.0 ** (len(str(int(raw))) - 1) if raw >= 1 else 10.0 ** -(_zeros(raw) + 1)
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [i * step for i in range(int(top / step) + 1)]


def _zeros(value: float) -> int:
    """Zeros after the decimal point."""
    count = 0
    while value < 0.1 and count < 12:
        value, count = value * 10, count + 1
    return count


def _frame(y_name: str, x_name: str, top: float, y: Callable[[float], float]) -> list[str]:
    out = [_text(LEFT - 8, 14, y_name, "start"), _text(WIDTH - RIGHT, HEIGHT - 6, x_name, "end")]
    for value in ticks(top):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" '
                   f'y2="{y(value):.1f}"/>')  # fmt: skip
        out.append(_text(LEFT - 8, y(value) + 4, f"{value:,g}", "end"))
    return out


def _legend(names: Sequence[str]) -> list[str]:
    out = []
    for i, name in enumerate(names):
        top = TOP + 18 * i
        colour = COLOURS[i % len(COLOURS)]
        out.append(
            f'<rect x="{WIDTH - RIGHT + 14}" y="{top}" width="10" height="10" fill="{colour}"/>'
        )
        out.append(_text(WIDTH - RIGHT + 30, top + 10, name, "start"))
    return out


def _dot(x: float, y: float, colour: str, title: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{escape(title)}</title></circle>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: int) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'
