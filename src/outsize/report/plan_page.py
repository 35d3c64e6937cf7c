"""A plan as one self-contained HTML page: the curve of tokens/s against memory, and a picture of what is
where. No script, no font, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from outsize.report import svg
from outsize.report.plan_text import mb, width_name

COLOURS = {"fixed": "#9aa5b8", "weights": "#1f6feb", "disk": "#f0c674"}
LABELS = 6  # of the axis
Pieces = Sequence[tuple[str, str, int]]  # (name, one of COLOURS, bytes)


def page(plan: Mapping[str, Any]) -> str:
    """The page, from `outsize plan --json`."""
    first = f"{plan['first_token_s']:.3g} s after a prompt of {plan['prompt_tokens']}"
    parts = [
        f"<p><b>{plan['tokens_per_s']:.3g} tokens/s</b>, first token {first} tokens; the least that works "
        f"is {mb(plan['least_bytes'])}.</p>",
        "<h2>Tokens/s against memory</h2>",
        _curve(plan),
        *_family(plan["widths"]),
        "<h2>What is where</h2>",
        _picture(plan),
        svg.table(["what", "where", "MB"], list(_rows(plan))),
        f"<p>A token: max, and a quarter of min, of (read {mb(plan['bytes_per_token'])} at "
        f"{plan['disk_bytes_per_s'] / 1e9:.2f} GB/s = {plan['read_s'] * 1e3:,.1f} ms, compute "
        f"{plan['compute_s'] * 1e3:,.1f} ms). Machine measured {plan['machine_age_s'] / 3600:.1f} hours "
        "before.</p>",
        *(f"<p>Note: {escape(str(note))}.</p>" for note in plan["notes"]),
    ]
    return svg.page(f"outsize plan: {plan['model']} in {mb(plan['budget_bytes'])}", parts)


def _curve(plan: Mapping[str, Any]) -> str:
    memory, speed = zip(
        *((p["memory_bytes"], p["tokens_per_s"]) for p in plan["curve"]), strict=True
    )
    last = len(memory) - 1
    width = max(memory[-1] - memory[0], 1)
    here = max(0.0, min(1.0, (plan["budget_bytes"] - memory[0]) / width))
    shown = {round(last * i / (LABELS - 1)) for i in range(LABELS)}
    labels = [f"{m / 1e6:,.0f}" if i in shown else "" for i, m in enumerate(memory)]
    series = {
        "tokens/s": list(enumerate(speed)),
        "this budget": [(last * here, plan["tokens_per_s"])],
    }
    return svg.lines(series, "memory, MB", "tokens/s", labels)


def _family(widths: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of nested experts: how fast each width would be, and how surprised by a held-out text."""
    if not widths:
        return
    labels = [width_name(w["share"]) for w in widths]
    yield "<h2>Widths of nested experts</h2>"
    for name, what in (("tokens_per_s", "tokens/s"), ("perplexity", "perplexity")):
        points = [(float(i), float(w[name])) for i, w in enumerate(widths)]
        yield svg.lines({what: points}, "--width", what, labels)


def _picture(plan: Mapping[str, Any]) -> str:
    """One bar for the memory, one for what stays on disk, to one scale."""
    memory: list[tuple[str, str, int]] = [(n, "fixed", size) for n, size in plan["fixed"].items()]
    disk: list[tuple[str, str, int]] = []
    for g in plan["placement"]:
        if g["tier"] == "memory":
            memory.append((g["group"], "weights", g["bytes"]))
        else:
            disk.append((g["group"], "disk", g["bytes"]))
    most = max(sum(size for _, _, size in pieces) for pieces in (memory, disk))
    scale = (svg.WIDTH - svg.LEFT - 16) / max(most, 1)
    bars = (*_bar("memory", memory, 10, scale), *_bar("disk", disk, 66, scale))
    return svg.drawing(bars, 120)


def _bar(label: str, pieces: Pieces, top: int, scale: float) -> Iterator[str]:
    yield svg.text(svg.LEFT - 8, top + 24, label, "end")
    left = float(svg.LEFT)
    for name, kind, size in pieces:
        width, title = size * scale, f"{name}: {mb(size)}"
        yield svg.box((left, top, max(0.0, width - 1), 40), COLOURS[kind], title)
        if width > 8 * len(name):
            yield svg.text(left + 4, top + 24, name, "start", "fill:#000")
        left += width


def _rows(plan: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, size in plan["fixed"].items():
        yield name, "memory", f"{size / 1e6:,.1f}"
    for g in plan["placement"]:
        yield g["group"], g["tier"], f"{g['bytes'] / 1e6:,.1f}"
    yield "in memory", "", f"{plan['planned_bytes'] / 1e6:,.1f}"
