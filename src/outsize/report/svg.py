"""HTML pages with plots as inline SVG, which fetch nothing: lines, stacked bars, heat maps, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """Curves over evenly spaced places 0, 1, ...; those with a label have it below."""
    top = max((y for points in series.values() for _, y in points), default=1.0) * 1.06 or 1.0
    last = max(1, len(labels) - 1)

    def x(place: float) -> float:
        return LEFT + place / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP)

    out = _frame(y_name, x_name, top, y)
    shown = [(i, label) for i, label in enumerate(labels) if label]
    out += [text(x(i), HEIGHT - BOTTOM + 18, label, "middle") for i, label in shown]
    for number, (name, points) in enumerate(series.items()):
        colour, dash = COLOURS[number % len(COLOURS)], "5 4" if name == "belady" else "none"
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" '
                   f'stroke-dasharray="{dash}" points="{path}"/>')  # fmt: skip
        out += [_dot(x(a), y(b), colour, f"{name}: {b:.4g}") for a, b in points]
    return drawing(out + _legend(list(series)), HEIGHT)


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
            at = (left, y(base + value), step * 0.7, y(base) - y(base + value))
            out.append(box(at, colour, f"{name}: {kind} {value:,.4g}"))
            base += value
        shift = 18 + 13 * (place % 2)
        out.append(text(left + step * 0.35, HEIGHT - BOTTOM + shift, name, "middle"))
    return drawing(out + _legend(kinds), HEIGHT)


def heat(values: Sequence[Sequence[float]], x_name: str, y_name: str) -> str:
    """Rows of cells, the fuller the darker."""
    columns = max(len(row) for row in values)
    cell = (WIDTH - LEFT - 16) / columns
    tall = max(4.0, min(cell, 480 / len(values)))
    top = max(max(row) for row in values) or 1.0
    out = [text(LEFT, 14, f"{y_name} down, {x_name} across", "start")]
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            if value:
                at = (LEFT + c * cell, TOP + r * tall, cell, tall)
                out.append(box(at, f"{COLOURS[0]}{round(255 * (value / top) ** 0.5):02x}"))
    return drawing(out, int(TOP + len(values) * tall + 8))


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
    out = [text(LEFT - 8, 14, y_name, "start"), text(WIDTH - RIGHT, HEIGHT - 6, x_name, "end")]
    for value in ticks(top):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" '
                   f'y2="{y(value):.1f}"/>')  # fmt: skip
        out.append(text(LEFT - 8, y(value) + 4, f"{value:,g}", "end"))
    return out


def _legend(names: Sequence[str]) -> list[str]:
    out = []
    for i, name in enumerate(names):
        top = TOP + 18 * i
        colour = COLOURS[i % len(COLOURS)]
        out.append(box((WIDTH - RIGHT + 14, top, 10, 10), colour))
        out.append(text(WIDTH - RIGHT + 30, top + 10, name, "start"))
    return out


def _dot(x: float, y: float, colour: str, title: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{escape(title)}</title></circle>'


def text(x: float, y: float, words: str, anchor: str, style: str = "") -> str:
    more = f' style="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def box(at: tuple[float, float, float, float], colour: str, title: str = "") -> str:
    """A rectangle; `at`: x, y, width, height."""
    x, y, width, height = at
    told = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}">'
        f"{told}</rect>"
    )


def drawing(parts: Iterable[str], height: int) -> str:
    """A picture of WIDTH by `height`."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'
