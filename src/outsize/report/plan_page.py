"""A plan as one self-contained HTML page: the curve of tokens/s against memory, and a picture of what is
where. No script, no font, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from outsize.report.svg import ticks

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 320, 64, 44, 24
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:800px;margin:2em auto;padding:0 1em;color:#1c2430;
background:#fff} h1{font-size:1.3em} h2{font-size:1.05em;margin-top:2em}
table{border-collapse:collapse} td,th{padding:.2em .9em .2em 0;text-align:left}
td:last-child,th:last-child{text-align:right;font-variant-numeric:tabular-nums}
svg{max-width:100%;height:auto} .axis{stroke:#8a94a6} .grid{stroke:#e3e7ee} text{fill:#4a5568;font-size:12px}
.line{fill:none;stroke:#1f6feb;stroke-width:2.5} .dot{fill:#1f6feb} .here{stroke:#d1481f;stroke-dasharray:4 3}
.mark{fill:#d1481f} .fixed{fill:#9aa5b8} .held{fill:#1f6feb} .disk{fill:#f0c674}
@media(prefers-color-scheme:dark){body{background:#11161d;color:#dde3ec} text{fill:#aab4c3}
.grid{stroke:#263040}}
"""


def page(plan: Mapping[str, Any]) -> str:
    """The page, from `outsize plan --json`."""
    title = f"outsize plan: {escape(str(plan['model']))} in {_mb(plan['budget_bytes'])}"
    first = f"{plan['first_token_s']:.3g} s after a prompt of {plan['prompt_tokens']}"
    parts = [
        f"<h1>{title}</h1>",
        f"<p><b>{plan['tokens_per_s']:.3g} tokens/s</b>, first token {first} tokens; the least that works "
        f"is {_mb(plan['least_bytes'])}.</p>",
        "<h2>Tokens/s against memory</h2>",
        _curve(plan),
        "<h2>What is where</h2>",
        _picture(plan),
        "".join(_table(plan)),
        f"<p>A token: max, and a quarter of min, of (read {_mb(plan['bytes_per_token'])} at "
        f"{plan['disk_bytes_per_s'] / 1e9:.2f} GB/s = {plan['read_s'] * 1e3:,.1f} ms, compute "
        f"{plan['compute_s'] * 1e3:,.1f} ms). Machine measured {plan['machine_age_s'] / 3600:.1f} hours "
        "before.</p>",
        *(f"<p>Note: {escape(str(note))}.</p>" for note in plan["notes"]),
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    return head + "".join(parts) + "</html>\n"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def _curve(plan: Mapping[str, Any]) -> str:
    points = [(p["memory_bytes"], p["tokens_per_s"]) for p in plan["curve"]]
    low, high = points[0][0], max(points[-1][0], 1)
    low = low - (high - low) * 0.03
    top = max(v for _, v in points) * 1.08

    def x(memory: float) -> float:
        return LEFT + float((memory - low) / (high - low)) * (WIDTH - LEFT - 16)

    def y(speed: float) -> float:
        return HEIGHT - BOTTOM - float(speed / top) * (HEIGHT - BOTTOM - TOP)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="tokens/s against memory">']
    for tick in ticks(top):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 16}" y1="{y(tick):.1f}" '
                   f'y2="{y(tick):.1f}"/>')  # fmt: skip
        out.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for i in range(6):
        memory = low + (high - low) * i / 5
        out.append(f'<text x="{x(memory):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                   f"{memory / 1e6:,.0f}</text>")  # fmt: skip
    out.append(f'<text x="{WIDTH - 16}" y="{HEIGHT - 8}" text-anchor="end">memory, MB</text>')
    out.append(f'<text x="{LEFT - 8}" y="14" text-anchor="end">tokens/s</text>')
    path = " ".join(f"{x(m):.1f},{y(v):.1f}" for m, v in points)
    out.append(f'<polyline class="line" points="{path}"/>')
    for m, v in points:
        out.append(f'<circle class="dot" cx="{x(m):.1f}" cy="{y(v):.1f}" r="3">'
                   f"<title>{_mb(m)}: {v:.3g} tokens/s</title></circle>")  # fmt: skip
    out += _here(plan, x, y, high)
    return "".join(out) + "</svg>"


def _here(plan: Mapping[str, Any], x: Any, y: Any, high: float) -> Iterator[str]:
    at = min(plan["budget_bytes"], high)
    yield f'<line class="here" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    yield f'<circle class="mark" cx="{x(at):.1f}" cy="{y(plan["tokens_per_s"]):.1f}" r="5"/>'
    anchor = "end" if x(at) > WIDTH / 2 else "start"
    yield f'<text x="{x(at):.1f}" y="{TOP - 8}" text-anchor="{anchor}">this budget</text>'


def _picture(plan: Mapping[str, Any]) -> str:
    """One bar for the memory, one for what stays on disk, to one scale."""
    fixed = [(name, "fixed", size) for name, size in plan["fixed"].items()]
    held = [(g["group"], "held", g["bytes"]) for g in plan["placement"] if g["tier"] == "memory"]
    disk = [(g["group"], "disk", g["bytes"]) for g in plan["placement"] if g["tier"] != "memory"]
    scale = (WIDTH - LEFT - 16) / max(_total(fixed + held), _total(disk), 1)
    bars = _bar("memory", fixed + held, 10, scale) + _bar("disk", disk, 66, scale)
    return f'<svg viewBox="0 0 {WIDTH} 120" role="img" aria-label="placement">{bars}</svg>'


def _total(items: Sequence[tuple[str, str, int]]) -> int:
    return sum(size for _, _, size in items)


def _bar(label: str, items: Sequence[tuple[str, str, int]], top: int, scale: float) -> str:
    out, at = [f'<text x="{LEFT - 8}" y="{top + 24}" text-anchor="end">{label}</text>'], float(LEFT)
    for name, kind, size in items:
        width = size * scale
        out.append(f'<rect class="{kind}" x="{at:.1f}" y="{top}" width="{max(0.0, width - 1):.1f}" '
                   f'height="40"><title>{escape(name)}: {_mb(size)}</title></rect>')  # fmt: skip
        if width > 8 * len(name):
            out.append(
                f'<text x="{at + 4:.1f}" y="{top + 24}" style="fill:#000">{escape(name)}</text>'
            )
        at += width
    return "".join(out)


def _table(plan: Mapping[str, Any]) -> Iterator[str]:
    yield "<table><tr><th>what<th>where<th>MB"
    for name, size in plan["fixed"].items():
        yield f"<tr><td>{escape(name)}<td>memory<td>{size / 1e6:,.1f}"
    for g in plan["placement"]:
        yield f"<tr><td>{escape(g['group'])}<td>{g['tier']}<td>{g['bytes'] / 1e6:,.1f}"
    yield f"<tr><th>in memory<th><th>{plan['planned_bytes'] / 1e6:,.1f}</table>"
