"""Tables of what lazy.py measured: `python -m experiments.quality.lazy_summary FILE... -o FILE`.

Differences are to another way on the same prompt, and have 95 % intervals: the prompts drawn anew, with
replacement, 10,000 times.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments.quality.lazy import TOP
from experiments.runs import Row, arguments

DRAWS = 10_000
# Pairs to compare: what is worth what, at the same pairs computed.
AGAINST = [
    ("gentle, revive", "gentle"), ("gentle, drop", "gentle"), ("fast, revive", "fast"),
    ("fast, drop", "fast"), ("fast", "random tokens"), ("fast", "static prune"),
    ("fast", "early layers choose"), ("fast, drop", "static prune"), ("fast, revive", "static prune"),
    ("fast, revive", "early layers choose"), ("fast, window:16", "fast"),
    ("fast, window:48", "fast"), ("fast, window:48", "random tokens"),
    ("fast, window:48", "early layers choose"), ("fast, window:48", "static prune"),
]  # fmt: skip


def interval(values: Sequence[float]) -> Row:
    """Of the mean."""
    x = np.array(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(x), (DRAWS, len(x)))
    low, high = np.quantile(x[drawn].mean(1), [0.025, 0.975])
    return {"mean": float(x.mean()), "low": float(low), "high": float(high)}


def grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[object, ...], list[Row]]:
    out = defaultdict[tuple[object, ...], list[Row]](list)
    for row in rows:
        out[tuple(row[key] for key in keys)].append(row)
    return out


def asked(rows: Sequence[Row]) -> Iterator[Row]:
    for (model, asks), some in grouped(rows, "model", "asks").items():
        ways = {str(way): found for (way,), found in grouped(some, "way").items()}
        for way, found in ways.items():
            about = {"model": model, "asks": asks, "way": way}
            yield about | _about(found) | _apart(found, ways["full"])
            for (gold,), placed in grouped(found, "gold").items():
                at = {"part": "place", "gold": gold, "prompts": len(placed)}
                yield about | at | _apart(placed, ways["full"])
        for way, other in AGAINST:
            if way in ways and other in ways:
                about = {
                    "part": "against",
                    "model": model,
                    "asks": asks,
                    "way": way,
                    "other": other,
                }
                yield about | _apart(ways[way], ways[other])


def _about(found: Sequence[Row]) -> Row:
    return {
        "part": "qa", "prompts": len(found), "tokens": statistics.mean(r["tokens"] for r in found),
        "share": statistics.mean(r["share"] for r in found), "right": sum(r["right"] for r in found),
        "nats": statistics.mean(r["nats"] for r in found),
    }  # fmt: skip


def _apart(found: Sequence[Row], other: Sequence[Row]) -> Row:
    by_question = {r["question"]: r for r in other}
    pairs = [(r, by_question[r["question"]]) for r in found]
    return {
        "right_apart": interval([float(a["right"]) - float(b["right"]) for a, b in pairs]),
        "nats_apart": interval([a["nats"] - b["nats"] for a, b in pairs]),
        "times_as_fast": statistics.median(b["cpu_s"] / a["cpu_s"] for a, b in pairs),
        "all_as_fast": sum(b["cpu_s"] for _, b in pairs) / sum(a["cpu_s"] for a, _ in pairs),
    }


def text(rows: Sequence[Row]) -> Iterator[Row]:
    for (model,), some in grouped([r for r in rows if "held" in r], "model").items():
        layers = np.array([r["held"] for r in some]).mean(0)  # (layers, shares)
        first = [np.array(r["first_token"])[:, None] for r in some]
        rest = sum(
            ((r["held"] - one) / (1 - one)).mean(0) for r, one in zip(some, first, strict=True)
        )
        kept = {
            key: np.array([r[key] for r in some]).mean(0)
            for key in ("ends", "best_68", "first_token")
        }
        yield {
            "part": "attention", "model": model, "prompts": len(some), "tokens": some[0]["tokens"],
            "top": TOP, "held": layers.mean(0).tolist(), "held_least": layers.min(0).tolist(),
            "held_most": layers.max(0).tolist(), "layers": len(layers),
            "uniform_68": 68 / some[0]["tokens"], "held_but_first": (rest / len(some)).tolist(),
            "held_by_layer": layers.tolist(),
        } | {key: float(x.mean()) for key, x in kept.items()}  # fmt: skip
    points = [{"score": "last"} | r for r in rows if "kl" in r]
    by_last = {
        (r["passage"], r["after"], r["keep"]): r["kl"] for r in points if r["score"] == "last"
    }
    for about, some in grouped(points, "model", "after", "keep", "score").items():
        yield dict(zip(("model", "after", "keep", "score"), about, strict=True)) | {
            "part": "one point", "prompts": len(some),
            "share": statistics.mean(r["share"] for r in some), "kl": interval([r["kl"] for r in some]),
            "kl_median": statistics.median(r["kl"] for r in some), "top1": sum(r["top1"] for r in some),
            "less_than_last": sum(r["kl"] < by_last[r["passage"], r["after"], r["keep"]] for r in some),
            "first_kept": sum(r["first_kept"] for r in some if "first_kept" in r),
        }  # fmt: skip


def decoded(rows: Sequence[Row]) -> Iterator[Row]:
    for (model,), some in grouped(rows, "model").items():
        full = {r["passage"]: r for r in some if r["way"] == "full"}
        for (way,), found in grouped(some, "way").items():
            pairs = [(r, full[r["passage"]]) for r in found]
            yield {
                "part": "decode", "model": model, "way": way, "prompts": len(found),
                "tokens": found[0]["tokens"], "steps": found[0]["steps"],
                "share": statistics.mean(r["share"] for r in found),
                "share_after": statistics.mean(r["share_after"] for r in found),
                "decode_time": statistics.median(a["decode_cpu_s"] / b["decode_cpu_s"] for a, b in pairs),
                "prefill_time": statistics.median(a["cpu_s"] / b["cpu_s"] for a, b in pairs),
                "whole_time": statistics.median(_whole(a) / _whole(b) for a, b in pairs),
            }  # fmt: skip


def _whole(row: Row) -> float:
    return float(row["cpu_s"] + row["decode_cpu_s"])


PARTS: dict[str, Callable[[Sequence[Row]], Iterator[Row]]] = {
    "qa": asked,
    "text": text,
    "decode": decoded,
}


def summary(files: Sequence[Path]) -> list[Row]:
    rows = [
        json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return [
        row for part, found in grouped(rows, "part").items() for row in PARTS[str(part[0])](found)
    ]


def main() -> None:
    a = arguments(__doc__, "files+")
    found = summary([Path(file) for file in a.files])
    lines = "".join(json.dumps(row) + "\n" for row in found)
    print(lines, end="")
    if a.output is not None:
        a.output.write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
