"""Pictures of what paging.py measured: `python -m experiments.memory.plot FILE.jsonl... -o FOLDER`.

tokens-against-memory.svg: tokens/s at each budget, measured and planned. step-against-bytes.svg: seconds a
token against the bytes it read from disk, each model with the line of its disk's rate.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from experiments.runs import Row, arguments

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLOURS = ("#1f6feb", "#d1481f", "#2e8b57", "#8a4fbf")


def rows_by_model(paths: list[str]) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = {}
    for row in (json.loads(line) for path in paths for line in Path(path).read_text().splitlines()):
        if row.get("status") == 0 and row["cap"]:
            out.setdefault(row["model"].rsplit("-", 2)[0], []).append(row)
    return out


def memory(ax: Any, colour: str, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda r: r["cap"])
    x = [r["cap"] / 1e6 for r in rows]
    ax.plot(x, [r["tokens_per_s"] for r in rows], "o-", color=colour, label="measured")
    ax.plot(x, [r["plan_tokens_per_s"] for r in rows], "x--", color="#888", label="planned")
    ax.set_xlabel("memory for the whole process, MB", fontsize=8)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")


def steps(ax: Any, colour: str, rows: list[Row]) -> None:
    x = [r["bytes_per_token"] / 1e6 for r in rows]
    ax.plot(x, [1e3 / r["tokens_per_s"] for r in rows], "o", color=colour)
    rate = statistics.median(v for r in rows for v in r["disk_bytes_per_s"])
    line, label = [0, max(x) * 1e9 / rate], f"{rate / 1e9:.2f} GB/s"
    ax.plot([0, max(x)], line, "--", color="#888", label=label)
    ax.set_xlabel("MB read from disk a token", fontsize=8)


def draw(models: dict[str, list[Row]], panel: Callable[..., None], y: str, path: Path) -> None:
    """A panel a model."""
    size = 3.6 * len(models), 3.1
    figure, axes = plt.subplots(1, len(models), figsize=size, squeeze=False)
    for ax, colour, (name, rows) in zip(axes[0], COLOURS, models.items(), strict=False):
        panel(ax, colour, rows)
        ax.set_title(name, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.25)
    axes[0][0].set_ylabel(y, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    a = arguments(__doc__, "files+")
    models = rows_by_model(a.files)
    draw(models, memory, "tokens/s", a.output / "tokens-against-memory.svg")
    draw(models, steps, "ms a token", a.output / "step-against-bytes.svg")


if __name__ == "__main__":
    main()
