"""Pictures of what paging.py measured: `python -m experiments.memory.plot FILE.jsonl... -o FOLDER`.

tokens-against-memory.svg: tokens/s at each budget, measured and planned. step-against-bytes.svg: seconds a
token against the bytes it read from disk, each model with the line of its disk's rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLOURS = ("#1f6feb", "#d1481f", "#2e8b57", "#8a4fbf")


def rows_by_model(paths: list[Path]) -> dict[str, list[dict[str, Any]]]:
    out: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row.get("status") == 0 and row["cap"]:
                out.setdefault(row["model"].rsplit("-", 2)[0], []).append(row)
    return out


def memory(models: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(models), figsize=(3.6 * len(models), 3.1), squeeze=False)
    for ax, colour, (name, rows) in zip(axes[0], COLOURS, models.items(), strict=False):
        rows = sorted(rows, key=lambda r: r["cap"])
        x = [r["cap"] / 1e6 for r in rows]
        ax.plot(x, [r["tokens_per_s"] for r in rows], "o-", color=colour, label="measured")
        ax.plot(x, [r["plan_tokens_per_s"] for r in rows], "x--", color="#888", label="planned")
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("memory for the whole process, MB", fontsize=8)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.25)
    axes[0][0].set_ylabel("tokens/s", fontsize=8)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def steps(models: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(models), figsize=(3.6 * len(models), 3.1), squeeze=False)
    for ax, colour, (name, rows) in zip(axes[0], COLOURS, models.items(), strict=False):
        x = [r["bytes_per_token"] / 1e6 for r in rows]
        ax.plot(x, [1e3 / r["tokens_per_s"] for r in rows], "o", color=colour)
        rate = statistics.median(v for r in rows for v in r["disk_bytes_per_s"])
        ax.plot(
            [0, max(x)],
            [0, max(x) * 1e9 / rate],
            "--",
            color="#888",
            label=f"{rate / 1e9:.2f} GB/s",
        )
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("MB read from disk a token", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.25)
    axes[0][0].set_ylabel("ms a token", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("files", nargs="+", type=Path)
    p.add_argument("-o", "--output", type=Path, required=True)
    a = p.parse_args()
    models = rows_by_model(a.files)
    memory(models, a.output / "tokens-against-memory.svg")
    steps(models, a.output / "step-against-bytes.svg")


if __name__ == "__main__":
    main()
