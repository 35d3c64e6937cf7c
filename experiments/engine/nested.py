"""What a width brings in time: single tokens at several widths in turn, so that neighbours disturb all alike;
wall-clock and processor time a token (medians), and bytes from disk. `--dense`: the base model beside it.

    python -m experiments.engine.nested NESTED-PACK --dense MODEL --memory 300MB -o FILE.jsonl"""

from __future__ import annotations

import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import outsize
from experiments.runs import arguments
from outsize.engine.model import Model
from outsize.forward.full import full
from outsize.forward.span import Span

WIDTHS = ("full", 0.75, 0.5, 0.3)


class Way:
    """A model at a width, with a text of its own."""

    def __init__(self, name: str, model: Model, width: str | float) -> None:
        self.name, self._model = name, model
        self.width = model.transformer.nested.width(width)
        self._kv, self.at = model.transformer.new_kv(1024), 0
        self.wall, self.cpu, self.read = list[float](), list[float](), list[int]()

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> None:
        transformer, loaded = self._model.transformer, self._model.transformer.loaded
        before = loaded.stats.bytes_read + loaded.expert_stats.bytes_read
        wall, cpu = time.perf_counter(), time.process_time()
        span = Span(self.at, tokens[self.at : self.at + 1], width=self.width)
        full(transformer, [span], [self._kv])
        self.at += 1
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        self.read.append(loaded.stats.bytes_read + loaded.expert_stats.bytes_read - before)


def main() -> None:
    args = arguments(__doc__, "nested", dense="", memory="auto", text=Path, tokens=64, name="smol",
                     threads=2, rounds=3, machine="busy")  # fmt: skip
    text = args.text.read_text()[:20_000]
    with ExitStack() as opened:
        how = {"memory": args.memory, "context": 1024, "draft": "none", "prefix_cache": "off",
               "threads": args.threads, "quiet": True}  # fmt: skip
        models = [opened.enter_context(outsize.load(args.nested, **how))]  # type: ignore[arg-type]
        ways = [Way(str(w), models[0], w) for w in WIDTHS]
        if args.dense:
            models.append(opened.enter_context(outsize.load(args.dense, **how)))  # type: ignore[arg-type]
            ways.append(Way("dense", models[-1], "full"))
        tokens = models[0].tokens.encode(text)[:1000]
        for _ in range(args.rounds):
            for way in ways:
                for _ in range(args.tokens):
                    way.step(tokens)
        skip = args.tokens // 4
        for way in ways:
            rows = [i for i in range(len(way.wall)) if i % args.tokens >= skip]
            row = {
                "model": args.name, "memory": args.memory, "width": way.name, "threads": args.threads,
                "executed": 1.0 if way.width is None else round(way.width.executed, 4),
                "wall_ms": round(1e3 * statistics.median(way.wall[i] for i in rows), 3),
                "cpu_ms": round(1e3 * statistics.median(way.cpu[i] for i in rows), 3),
                "read_mb": round(statistics.mean(way.read[i] for i in rows) / 1e6, 3),
                "tokens": len(rows), "machine": args.machine,
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            if args.output is not None:
                with args.output.open("a") as out:
                    out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
